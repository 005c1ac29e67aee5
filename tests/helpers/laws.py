"""What processors do to a law, slowly and obviously."""

import numpy as np
import numpy.typing as npt

Law = npt.NDArray[np.float64]


def tempered_top_p(scores_V: Law, temperature: float, top_p: float) -> Law:
    """The softmax at a temperature, then its likeliest tokens until they hold `top_p`."""
    probs = np.exp((scores_V - scores_V.max()) / temperature)
    probs /= probs.sum()
    kept, mass = np.zeros(len(probs), dtype=bool), 0.0
    for token in np.argsort(-probs):
        if mass >= top_p:
            break
        kept[token], mass = True, mass + probs[token]
    law: Law = np.where(kept, probs, 0.0) / probs[kept].sum()
    return law
