"""The comparisons of task2_diffusion.py, one change at a time: short training runs, then sampling with the saved model.

The names are rows of the experiment table and paths in the results file.
"""

NUM_SAMPLES = 450  # per experiment
BASELINE = {"average": 0.99, "epochs": 3}  # of the training runs; with so few steps the average is shorter
TRAINING = {
    "baseline": {},
    "standardised pictures": {"standardized": True},
    "noise instead of velocity": {"target": "noise"},
    "absolute instead of squared error": {"loss": "mae"},
    "no moving average": {"average": 0.0},
    "no attention": {"attention": False},
}
GUIDANCE = {f"guidance {weight:g}": {"guidance": weight} for weight in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)}
SPACING = {f"spacing {exponent:g}": {"spacing": exponent} for exponent in (1.0, 1.5, 2.0, 3.0)}
STEPS = {
    f"{sampler}, {steps} steps": {"sampler": sampler, "steps": steps}
    for steps in (5, 10, 20, 50, 100, 200)
    for sampler in ("ddim", "ddpm")
}
SAMPLING = GUIDANCE | SPACING | STEPS
EXPERIMENTS = TRAINING | SAMPLING
QUICK = ("baseline", "ddpm, 5 steps")
