"""What tests of the sampling loop share: a start, and a model whose answer is known."""

from stable_cascade_nodes.cascade_ops.diffusion import draw_noise, log_snr_at, signal_and_noise


def start(generators, channels=16, size=(6, 8)):
    """The noise that a run begins from, one image per generator."""
    return draw_noise(generators, (len(generators), channels, *size))


class Towards:
    """Predicts the noise that makes the clean latent `goal`; keeps what it was shown."""

    def __init__(self, goal):
        self.goal, self.seen = goal, []

    def prepare(self, noise_cond, shape, guided):
        levels = log_snr_at(noise_cond)

        def predict(x, index, guided):
            a, b = signal_and_noise(levels[index])
            self.seen.append((x, a, b))
            return (x - a * self.goal) / b, None

        return predict
