"""The off-switch game: when does a robot gain by leaving its off switch to a human, and how much?

Prints what acting, switching off and waiting are worth as the robot's uncertainty and the human's error grow, then the
same game solved as an assistance game, and draws the gain to off_switch_game.png if matplotlib is installed.
Run: python examples/off_switch_game.py   (seconds)
"""

import importlib.util

import jax.numpy as jnp

from jaxalign.irl import literal_human, normal_bins, off_switch_game, off_switch_values, solve_assistance

MEAN, STDS, TEMPERATURES, PICTURE = 0.5, (0.1, 0.5, 1.0, 2.0), (0.0, 0.25, 1.0, 4.0), "off_switch_game.png"


def print_table():
    print(f"The action is worth {MEAN} on average. Human's error (temperature), robot's uncertainty (std):")
    print("error    std      act      off     wait   gain by waiting")
    for temperature in TEMPERATURES:
        for std in STDS:
            values = off_switch_values(MEAN, std, temperature=temperature)
            print(f"{temperature:<8} {std:<4}" + "".join(f" {float(x):8.4f}" for x in values))


def print_game():
    """The same choice as a game with 20 hypotheses, solved by exact alpha vectors."""
    print("\nAs an assistance game (mean 0, std 1): the best robot's value and choice")
    utilities, probabilities = normal_bins(0.0, 1.0, num=20)
    game = off_switch_game(utilities, probabilities)
    for temperature in TEMPERATURES:
        beta = 1.0 / temperature if temperature else jnp.inf
        plan = solve_assistance(game, horizon=2, human=literal_human(game, beta=beta))
        choice = ("act", "switch off", "wait")[int(plan.robot_action[0, 0, plan.start[0]])]
        print(f"error {temperature:<5} value {float(plan.value):.6f}  {choice}")


def draw():
    """The robot's gain by waiting over its uncertainty and the human's error."""
    from matplotlib.figure import Figure

    stds, temperatures = jnp.meshgrid(jnp.linspace(0.01, 3.0, 150), jnp.linspace(0.0, 4.0, 150))
    gain = off_switch_values(MEAN, stds, temperature=temperatures).incentive
    axes = Figure(figsize=(5.5, 4.0), layout="constrained").subplots()
    reach = float(jnp.abs(gain).max())
    image = axes.pcolormesh(stds, temperatures, gain, cmap="RdBu", vmin=-reach, vmax=reach, rasterized=True)
    axes.contour(stds, temperatures, gain, [0.0], colors="black")
    axes.set(xlabel="robot's uncertainty (std of U)", ylabel="human's error (temperature)")
    axes.set_title(f"Gain by leaving the switch to the human, E[U] = {MEAN}")
    axes.figure.colorbar(image, ax=axes)
    axes.figure.savefig(PICTURE, dpi=150)
    print(f"\nwrote {PICTURE}: left of the black line the robot would rather not ask")


if __name__ == "__main__":
    print_table()
    print_game()
    if importlib.util.find_spec("matplotlib"):
        draw()
    else:
        print('\nno picture: pip install "jaxalign[viz]"')
