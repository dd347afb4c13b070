"""What voc_segmentation.py compares: changes of one field each, short training runs, measured on validation images.

The question is which loss, augmentation and learning rate the U-Net with bilinear upsampling needs.
"""

EPOCHS = 5
EXPERIMENTS = {
    "baseline": {},
    "cross-entropy alone": {"loss": "cross-entropy"},
    "Dice loss alone": {"loss": "dice"},
    "no augmentation": {"augment": False},
    "learning rate 0.0003": {"learning_rate": 3e-4},
    "learning rate 0.003": {"learning_rate": 3e-3},
}
# Five seeds of the baseline show how much results vary by chance; variants have two.
RUNS = [(name, seed) for name in EXPERIMENTS for seed in range(5 if name == "baseline" else 2)]
