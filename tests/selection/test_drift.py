"""The drift limit learned from finished runs."""

from pipeline.selection.drift import largest_drift, last_drift, learned_limit


def test_the_limit_is_the_largest_drift_that_kept_the_floor() -> None:
    pairs = [(0.02, 0.99), (0.08, 0.96), (0.05, 0.94), (0.3, 0.5)]
    assert learned_limit(pairs, 0.95) == 0.08
    assert learned_limit(pairs, 0.995) is None


def test_a_run_drifts_as_far_as_the_worse_of_images_and_texts() -> None:
    history = {"keep/drift_image": [(2, 0.1), (4, 0.2)], "keep/drift_text": [(4, 0.3)], "train/loss": [(4, 9.0)]}
    assert last_drift(history) == 0.3
    assert largest_drift({"train/loss": 1.0}) is None
