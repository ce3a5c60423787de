"""`jaxalign certify`: what is proven about a network, beside what an attack can do to it."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Certify:
    """Prove for each image that no change of its pixels by up to epsilon alters its class, and attack it as well.

    An attack shows at best that an image falls; a certificate shows that it cannot. The share certified is a lower
    bound of the accuracy under any attack, the share that the attacks leave is an upper one, and the truth lies in the
    gap. The model is one that `jaxalign robust-train` left in its run directory; without --model a small network is
    trained for certificates first, on digits, in seconds. The run directory gets report.html (both accuracies against
    epsilon, how far each certificate reaches), results.json, certificates.npz and TensorBoard logs. A stopped run goes
    on with --resume, with the images it has not done.

    Every certificate is attacked as well, right up to its edge: an attack that wins inside one is an error that ends
    the run, and the image is kept in broken-certificates.npz.

    With --onnx and --property one question about one network is answered instead: verified, falsified (with a
    counterexample) or unknown. With --smoothing a classifier is certified that votes over noisy copies of the image.

    Examples:
      jaxalign certify
      jaxalign certify --model runs/mnist --data mnist.npz --epsilons 0.05 0.1 0.2 0.3 --method crown-interval
      jaxalign certify --smoothing 0.25
      jaxalign certify --onnx net.onnx --property p.vnnlib --time-limit 60
    """

    model: Path | None = None
    """The run directory of `jaxalign robust-train` (of several seeds its first), or a classifier.npz. Default: train
    one, which takes seconds on digits."""
    data: str | None = None
    """`digits`, the 1,797 8x8 digits of scikit-learn, or an .npz file: x_train, y_train, x_test, y_test, or x and y;
    images [N, H, W] or [N, H, W, C], uint8 or floats in [0, 1]. Default: what the model was trained on, or digits."""
    out: Path = Path("runs/certify")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    method: Literal["interval", "crown-interval", "crown", "alpha-crown"] = "crown"
    """interval: the cheapest, of use on networks trained for it. crown-interval: lines instead of boxes in the last
    pass. crown: lines for every layer. alpha-crown: lines whose slopes are optimised for each image, the tightest and
    slowest."""
    epsilons: tuple[float, ...] = ()
    """How far each pixel may be changed, where black is 0 and white 1; the largest is as far as radii are looked for.
    Default: 0.05 0.1 0.15 0.2. With --smoothing the radii of its table, in L2 over the whole image; default: half,
    once, twice and three times its deviation."""
    images: int = 200
    """Test images certified (all, if there are fewer)."""
    attacks: tuple[Literal["fgsm", "pgd", "apgd", "square", "auto_attack"], ...] = ("pgd",)
    """What the certificates are held against. pgd is quick; auto_attack leaves the smallest gap."""
    steps: int = 40
    """Steps of pgd."""
    restarts: int = 1
    """Starts of pgd; the worst counts."""
    batch_size: int = 100
    """Images certified at once; after each such chunk the results are on disk."""
    pictures: int = 8
    """Images in each picture of the report."""
    seed: int = 0
    """Of the images drawn, the attacks' and the smoothing's random numbers, and the network trained without --model."""
    smoothing: float | None = None
    """Certify by randomised smoothing, with Gaussian noise of this standard deviation on every pixel."""
    samples: int = 10_000
    """Noisy copies of each image (--smoothing). More reach farther: a radius is at most about sigma times 3.2 with
    10,000 and sigma times 3.8 with 100,000."""
    failure: float = 0.001
    """Probability, at most, that a certificate by smoothing is wrong, for each image."""
    onnx: Path | None = None
    """A feed-forward network in ONNX; needs --property."""
    property: Path | None = None
    """A property in VNN-LIB: a box of inputs, and the outputs that must not be reached from it."""
    time_limit: float = 60.0
    """Seconds that the search for a proof or a counterexample may take (--onnx)."""

    def run(self) -> None:
        """Train or load, certify, attack, report. Exits with status 1 if an attack wins inside a certificate."""
        from rich.console import Console

        from jaxalign.cli.certify_run import run
        from jaxalign.runtime.certificate_check import BrokenCertificateError

        try:
            run(self, Console())
        except BrokenCertificateError as error:
            raise SystemExit(f"jaxalign: {error}") from error
