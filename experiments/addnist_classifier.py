"""The planned comparisons of addnist_classifier.py: what is each choice worth, and do size and steps limit it?

One change at a time from a baseline, judged on validation. The baselines run with five seeds, whose standard deviation
is the noise.
"""

BASELINES = {
    "shared": {
        "model": "shared",
        "widths": (16, 32, 48, 64),
        "steps": 5000,
        "batch_size": 64,
        "learning_rate": 3e-3,
    },
    "ordinary": {
        "model": "ordinary",
        "widths": (12, 24, 36, 48),
        "hidden": 96,
        "steps": 10_000,
        "batch_size": 64,
        "learning_rate": 1e-2,
    },
}
BOTH = {
    "no shifts": {"shift": False},
    "rotation 10°, scale 10 %": {"rotation": 10.0, "scale": 0.1},
    "rotation 15°, scale 15 %": {"rotation": 15.0, "scale": 0.15},
    "batches of 128": {"batch_size": 128},
    "1,000 steps": {"steps": 1000},
    "2,500 steps": {"steps": 2500},
}
VARIANTS = {
    "shared": {
        **BOTH,
        "10,000 steps": {"steps": 10_000},
        "filters 6 12 16 24": {"widths": (6, 12, 16, 24)},
        "filters 12 24 32 48": {"widths": (12, 24, 32, 48)},
        "filters 24 48 64 80": {"widths": (24, 48, 64, 80)},
    },
    "ordinary": {
        **BOTH,
        "5,000 steps": {"steps": 5000},
        "filters 4 8 12 16": {"widths": (4, 8, 12, 16)},
        "filters 6 12 16 24": {"widths": (6, 12, 16, 24)},
        "filters 8 16 24 32": {"widths": (8, 16, 24, 32)},
        "one encoder for all channels": {"model": "mixed", "widths": (24, 48, 64, 80)},
        "channels in random order": {"permute": True},
    },
}
