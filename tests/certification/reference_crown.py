"""Interval bounds and CROWN for chains of linear layers and ReLUs in NumPy, float64, with every matrix written out.

A network is a list of layers (weight [O, I], bias [O]) with a ReLU between two, for one flat x [I]:
z = W_L relu(... relu(W_1 x + b_1) ...) + b_L. `dense` and `conv` turn the kernels of Flax into such layers, a
convolution into its whole matrix.

Zhang et al. 2018, "Efficient Neural Network Robustness Certification with General Activation Functions": the lines of
a ReLU are their Tables 2 and 3, the backward pass their Theorem 3.2. Gowal et al. 2018 merge the last layer with the
specification.
"""

from collections.abc import Sequence

import numpy as np

Layer = tuple[np.ndarray, np.ndarray]


def dense(kernel: np.ndarray, bias: np.ndarray) -> Layer:
    """kernel [I, O], bias [O]."""
    return np.asarray(kernel, np.float64).T, np.asarray(bias, np.float64)


def conv(kernel: np.ndarray, bias: np.ndarray, shape: tuple[int, int, int], *, stride: int, padding: int) -> Layer:
    """kernel [h, w, I, O] over images `shape` (H, W, I), zeros around them on all sides; outputs (H', W', O), flat."""
    kernel, (height, width, channels) = np.asarray(kernel, np.float64), shape
    h, w, _, features = kernel.shape
    rows, columns = (height + 2 * padding - h) // stride + 1, (width + 2 * padding - w) // stride + 1
    weight = np.zeros((rows, columns, features, height, width, channels))
    for row in range(rows):
        for column in range(columns):
            for i in range(h):
                for j in range(w):
                    y, x = row * stride + i - padding, column * stride + j - padding
                    if 0 <= y < height and 0 <= x < width:
                        weight[row, column, :, y, x, :] = kernel[i, j].T
    return weight.reshape(rows * columns * features, -1), np.tile(np.asarray(bias, np.float64), rows * columns)


def forward(layers: Sequence[Layer], x: np.ndarray) -> np.ndarray:
    """The outputs [O] at x [I]."""
    for weight, bias in layers[:-1]:
        x = np.maximum(weight @ x + bias, 0)
    weight, bias = layers[-1]
    return weight @ x + bias


def merged(layers: Sequence[Layer], specification: np.ndarray | None) -> list[Layer]:
    """The network whose outputs are `specification` [S, O] of the outputs."""
    if specification is None:
        return list(layers)
    weight, bias = layers[-1]
    return [*layers[:-1], (specification @ weight, specification @ bias)]


def margins(label: int, num_classes: int) -> np.ndarray:
    """[C-1, C], the rows z_label - z_j for the other classes j in order."""
    others = np.delete(np.eye(num_classes), label, axis=0)
    return np.eye(num_classes)[label] - others


def affine_interval(layer: Layer, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of W x + b over the box."""
    weight, bias = layer
    positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
    return positive @ lower + negative @ upper + bias, positive @ upper + negative @ lower + bias


def pre_activation_intervals(
    layers: Sequence[Layer], lower: np.ndarray, upper: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Interval bounds of what each layer gives, the last included."""
    found = []
    for layer in layers:
        bounds = affine_interval(layer, lower, upper)
        found.append(bounds)
        lower, upper = np.maximum(bounds[0], 0), np.maximum(bounds[1], 0)
    return found


def relu_lines(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower slope, upper slope, upper intercept); the lower line goes through 0.

    lower_slope * x <= relu(x) <= upper_slope * x + upper_intercept on [lower, upper]. Where the sign is open the upper
    line joins the ends, and the lower slope is 1 if upper > -lower and 0 otherwise, which leaves the smaller area.
    """
    active, unstable = lower >= 0, (lower < 0) & (upper > 0)
    width = np.where(unstable, upper - lower, 1.0)
    upper_slope = np.where(unstable, upper / width, active.astype(float))
    upper_intercept = np.where(unstable, -upper * lower / width, 0.0)
    lower_slope = np.where(unstable, upper > -lower, active).astype(float)
    return lower_slope, upper_slope, upper_intercept


def backward(
    layers: Sequence[Layer], hidden: Sequence[tuple[np.ndarray, np.ndarray]], lower: np.ndarray, upper: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """CROWN bounds of the last layer's outputs, from bounds `hidden` of what each layer before it gives."""
    sides = []
    for sign in (1.0, -1.0):  # the upper bound of z is minus the lower bound of -z
        weight, bias = sign * layers[-1][0], sign * layers[-1][1]
        for (next_weight, next_bias), bounds in zip(layers[-2::-1], hidden[::-1], strict=True):
            lower_slope, upper_slope, upper_intercept = relu_lines(*bounds)
            positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
            bias = bias + negative @ upper_intercept
            weight = positive * lower_slope + negative * upper_slope
            bias, weight = bias + weight @ next_bias, weight @ next_weight
        sides.append(np.maximum(weight, 0) @ lower + np.minimum(weight, 0) @ upper + bias)
    return sides[0], -sides[1]


def interval(
    layers: Sequence[Layer], lower: np.ndarray, upper: np.ndarray, specification: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Interval bound propagation: bounds [S] over the box [I], the last layer merged with the specification."""
    return pre_activation_intervals(merged(layers, specification), lower, upper)[-1]


def crown(
    layers: Sequence[Layer],
    lower: np.ndarray,
    upper: np.ndarray,
    specification: np.ndarray | None = None,
    *,
    intermediate: str = "crown",
) -> tuple[np.ndarray, np.ndarray]:
    """CROWN: bounds [S] over the box [I].

    intermediate: "crown", bounds of the hidden layers by CROWN too, the first ones first; "interval", by intervals
    (CROWN-IBP). Neither takes the better of the two.
    """
    layers = merged(layers, specification)
    if intermediate == "interval":
        hidden = pre_activation_intervals(layers, lower, upper)[:-1]
        return backward(layers, hidden, lower, upper)
    hidden = []
    for depth in range(1, len(layers)):
        hidden.append(backward(layers[:depth], hidden, lower, upper))
    return backward(layers, hidden, lower, upper)
