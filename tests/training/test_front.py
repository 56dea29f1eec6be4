from fiducial.training.front import Point, best, front

A, B, C, D = Point(1, 1.0, 0.0), Point(2, 2.0, 0.5), Point(3, 1.5, 0.9), Point(4, 3.0, 2.0)


def test_the_front_is_what_nothing_beats_in_both():
    assert front([A, B, C, D]) == [A, B, D]
    assert front([A, A._replace(step=9)]) == [A]


def test_the_best_is_the_most_rewarded_within_the_limit_and_else_the_cheapest():
    assert best([A, B, C, D], limit=1.0) == B
    assert best([A, B, C, D], limit=5.0) == D
    assert best([B, C, D], limit=-1.0) == B
