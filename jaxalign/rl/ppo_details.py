"""The 37 details of PPO implementations that Huang et al. (2022) found to matter, and where each is here.

"The 37 Implementation Details of Proximal Policy Optimization", ICLR blog track 2022; numbers and groups are theirs.
"""

from typing import NamedTuple


class Detail(NamedTuple):
    """One detail.

    group, number: as in the paper
    name: what it is
    where: the function of `jaxalign.rl` that has it and its argument, "function(argument)", or "function" where it is
        always so; empty if it is not provided
    note: what differs here, or why it is not provided
    test: the test that shows it, "file::test" under tests/; empty if it is not provided
    """

    group: str
    number: int
    name: str
    where: str
    note: str
    test: str


NO_EMULATOR = "belongs to the Atari emulator, which is not here; write it as a wrapper of an Environment"
PPO, POLICY, RECURRENT = "rl/test_ppo.py::", "rl/test_policies.py::", "rl/test_recurrent_ppo.py::"

DETAILS = (
    Detail("core", 1, "vectorised environments", "ppo_parts(num_envs)", "rollouts go on where the last one stopped",
           PPO + "test_a_rollout_holds_true_successors_and_what_the_policy_said"),
    Detail("core", 2, "orthogonal weights, zero biases", "actor_critic", "sqrt(2) within, 0.01 and 1 at the heads",
           POLICY + "test_networks_start_orthogonal"),
    Detail("core", 3, "Adam's epsilon 1e-5", "ppo_optimizer", "", PPO + "test_the_optimizer_is_the_customary_one"),
    Detail("core", 4, "learning rate annealed to 0", "ppo_optimizer(anneal_over)", "",
           PPO + "test_the_optimizer_is_the_customary_one"),
    Detail("core", 5, "generalised advantage estimation", "ppo_parts(gae_lambda)",
           "a time limit is bootstrapped through, at the true next observation",
           PPO + "test_the_first_gradient_step_minimises_the_loss_numpy_computes"),
    Detail("core", 6, "minibatches drawn without replacement", "ppo_parts(num_minibatches)", "",
           PPO + "test_every_pass_sees_every_step_once"),
    Detail("core", 7, "advantages normalised in a minibatch", "surrogate_loss(normalize_advantages)", "",
           PPO + "test_advantages_are_normalised_in_the_minibatch"),
    Detail("core", 8, "clipped surrogate objective", "surrogate_loss(clip_epsilon)", "",
           "rl/test_policy_losses.py::test_ppo_by_hand"),
    Detail("core", 9, "clipped value loss", "surrogate_loss(value_clip_epsilon)", "off unless given",
           "rl/test_policy_losses.py::test_ppo_by_hand"),
    Detail("core", 10, "one loss with an entropy bonus", "surrogate_loss(entropy_coefficient)", "",
           PPO + "test_the_first_gradient_step_minimises_the_loss_numpy_computes"),
    Detail("core", 11, "gradient clipped by its global norm", "ppo_optimizer(max_gradient_norm)", "",
           PPO + "test_the_optimizer_is_the_customary_one"),
    Detail("core", 12, "metrics to debug by", "ppo", "approx_kl is the k3 estimate",
           PPO + "test_learning_stops_at_the_target_kl"),
    Detail("core", 13, "shared or separate networks", "actor_critic(shared)", "",
           POLICY + "test_networks_fit_their_spaces"),
    *(Detail("Atari", number, name, "", NO_EMULATOR, "") for number, name in (
        (1, "NoopResetEnv"), (2, "MaxAndSkipEnv"), (3, "EpisodicLifeEnv"), (4, "FireResetEnv"), (5, "WarpFrame"),
    )),
    Detail("Atari", 6, "rewards clipped to their sign", "reward_function",
           "reward_function(lambda steps: jnp.sign(steps.rewards))",
           PPO + "test_an_incentive_pays_instead_of_the_environment"),
    Detail("Atari", 7, "frames stacked", "", "recurrent_ppo remembers instead; or write it as a wrapper", ""),
    Detail("Atari", 8, "a shared convolutional network", "", "any network is an ActorCritic; there is no preset", ""),
    Detail("Atari", 9, "pixels scaled to [0, 1]", "", "in the network of an ActorCritic of your own", ""),
    Detail("continuous", 1, "normal distributions of actions", "policy_head", "tanh-normal where actions have limits",
           POLICY + "test_the_squashed_density_is_that_of_the_change_of_variables"),
    Detail("continuous", 2, "deviations that do not depend on the state", "actor_critic(initial_scale)", "",
           POLICY + "test_networks_fit_their_spaces"),
    Detail("continuous", 3, "independent components", "policy_head", "",
           POLICY + "test_a_drawn_action_has_the_density_it_was_said_to_have"),
    Detail("continuous", 4, "separate networks for policy and value", "actor_critic(shared)", "separate unless asked",
           POLICY + "test_networks_fit_their_spaces"),
    Detail("continuous", 5, "actions clipped to their limits", "policy_head",
           "squashed by tanh, so that the density is that of what is done; `clip_actions` of the environments clips",
           POLICY + "test_actions_stay_inside_and_their_densities_finite"),
    Detail("continuous", 6, "observations normalised", "ppo_parts(normalize_observations)",
           "moments rest during a rollout and its gradient steps",
           PPO + "test_observations_are_normalised_by_all_that_was_seen"),
    Detail("continuous", 7, "observations clipped", "ppo_parts(normalize_observations)", "at 10 deviations",
           "environments/test_running_moments.py::test_by_hand"),
    Detail("continuous", 8, "rewards scaled", "ppo_parts(normalize_rewards)", "by the returns of a whole rollout",
           PPO + "test_rewards_are_scaled_by_the_deviation_of_returns"),
    Detail("continuous", 9, "rewards clipped", "scale_rewards(clip)", "at 10 deviations",
           PPO + "test_rewards_are_scaled_by_the_deviation_of_returns"),
    Detail("LSTM", 1, "orthogonal weights, zero biases", "recurrent_actor_critic", "gated recurrent units, not an LSTM",
           RECURRENT + "test_units_are_those_of_the_equations"),
    Detail("LSTM", 2, "memory starts at zero", "recurrent_actor_critic", "",
           RECURRENT + "test_units_are_those_of_the_equations"),
    Detail("LSTM", 3, "memory starts anew with an episode", "recurrent_actor_critic", "",
           RECURRENT + "test_units_are_those_of_the_equations"),
    Detail("LSTM", 4, "minibatches of whole sequences", "recurrent_ppo_parts(num_minibatches)", "",
           RECURRENT + "test_the_gradient_sees_the_policy_that_acted"),
    Detail("LSTM", 5, "memory rebuilt while learning", "recurrent_ppo_parts", "from that at the rollout's beginning",
           RECURRENT + "test_the_gradient_sees_the_policy_that_acted"),
    Detail("MultiDiscrete", 1, "independent discrete components", "",
           "the spaces are Discrete and Box; number the combinations", ""),
)  # fmt: skip
