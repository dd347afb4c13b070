"""The comparisons of pegasus_gan.py with the trained diffusion model: a setting of a method changed at a time, or two.

An experiment is (method, changed fields of `Composition` or, of "learned", `Sampling`, other arguments of the method).
The names are rows of the experiment table.
"""

BASELINE_SEEDS, SEEDS = 5, 2  # the deviation of the baseline over its seeds is the noise of the comparison
EXPERIMENTS = {
    "baseline": ("composition", {}, {}),
    **{f"guidance of the wings {weight:g}": ("composition", {"second": weight}, {}) for weight in (1.5, 3.0, 8.0)},
    **{f"guidance of the horse {weight:g}": ("composition", {"first": weight}, {}) for weight in (1.0, 4.0)},
    **{f"wings {pixels} pixels high": ("composition", {}, {"height": pixels}) for pixels in (5, 7, 11)},
    **{f"wing class shifted by {pixels} pixels": ("composition", {"shift": pixels}, {}) for pixels in (0, 3, 9)},
    **{f"{count} correctors": ("composition", {"correctors": count}, {}) for count in (0, 2)},
    **{f"band located from time {time:g}": ("composition", {"layout": time}, {}) for time in (0.6, 0.85)},
    **{f"unconditional from time {time:g}": ("composition", {"heal": time}, {}) for time in (0.0, 0.35)},
    "collage": ("collage", {}, {}),
    **{f"collage noised to time {time:g}": ("collage", {"start": time}, {}) for time in (0.1, 0.3, 0.4, 0.55, 0.7)},
    "collage, unconditional throughout": ("collage", {"heal": 0.2}, {}),
    "collage, composed": ("collage", {}, {"composed": True}),
    **{f"collage, guidance {weight:g}": ("collage", {"first": weight}, {}) for weight in (1.0, 4.0)},
    "learned": ("learned", {}, {}),
    **{f"learned, guidance {weight:g}": ("learned", {"guidance": weight}, {}) for weight in (1.0, 2.0, 3.0, 6.0)},
    "learned, guided away from no class": ("learned", {}, {"away_from": "no class"}),
    "learned, guided away from no class, guidance 2": ("learned", {"guidance": 2.0}, {"away_from": "no class"}),
    "learned, 40 steps": ("learned", {"steps": 40}, {}),
}
BASELINES = ("baseline", "collage", "learned")  # of each method
QUICK = ("baseline", "collage", "learned")


def runs(seed, quick):
    """Returns the planned runs, dicts of name and seed, in the order in which they are made."""
    names = QUICK if quick else EXPERIMENTS
    counts = {name: BASELINE_SEEDS if name in BASELINES and not quick else SEEDS for name in names}
    return [{"name": name, "seed": seed + number} for name, count in counts.items() for number in range(count)]
