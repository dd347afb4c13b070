"""The planned comparison of tell_the_time.py: what is each choice of trunk and training worth?

One change at a time from the baseline, at 75 x 75 pixels and after few epochs, judged on validation. The baseline runs
with five seeds, whose standard deviation is the noise.
"""

BASELINE = {"representation": "two_circles", "epochs": 4}
EXPERIMENTS = {
    "baseline": {},
    "rows and columns instead of rings and sectors": {"polar": False},
    "max pooling": {"pooling": "max"},
    "no augmentation": {"augment": False},
    "width 16": {"width": 16},
    "width 40": {"width": 40},
    "learning rate 0.002": {"learning_rate": 2e-3},
    "learning rate 0.01": {"learning_rate": 1e-2},
    "batch size 32": {"batch_size": 32},
}
NUM_SEEDS = {name: 5 if name == "baseline" else 2 for name in EXPERIMENTS}
