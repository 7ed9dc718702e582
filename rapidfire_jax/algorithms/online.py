"""Learning from one's own rollouts: what PPO, GRPO, RLOO and REINFORCE++ share.

    step       one minibatch: loss, gradients of `state.trainable`, optimiser
    update     rewards of tokens, advantages, then epochs x minibatches of `step`
    learn      the reference's log-probabilities, then `update`
    iteration  rollout, reward, `learn`: one program when the reward can be traced

An algorithm is an `OnlineAlgorithm`: how rewards become advantages, and the loss. None of the functions is jitted: jit
(and donate `state`) where you call them. Models enter as callables:

    apply(frozen, trainable, inputs, response_length, temperature) -> .logp_t, .entropy_t, .v_t  [B, T], .next_v [B]
    reference(frozen, inputs, response_length, temperature) -> ref_logp_t  [B, T]
    encode(frozen, tokens, attention_mask) -> inputs: a pytree of arrays with B rows, whatever the first two want to see
    sample(frozen, trainable, prompts, prompt_mask, key, temperature) -> Rollouts without ref_logp_t and score
    reward(rollouts) -> score  [B]

`.v_t` is read by algorithms with a critic alone, and `.next_v`, the value after the last token, only to bootstrap.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import ppo_loss as fused_loss
from rapidfire_jax.algorithms.kl import KLEstimator, adapt_kl_coef, kl_estimate
from rapidfire_jax.algorithms.loss_scale import over_steps
from rapidfire_jax.algorithms.masking import (
    Aggregation,
    Mean,
    Metrics,
    PartialMetrics,
    Peak,
    aggregate,
    masked_mean,
    masked_sum,
)
from rapidfire_jax.algorithms.packing import Packing, objection
from rapidfire_jax.algorithms.reward_shaping import Normalization, RunningStats
from rapidfire_jax.algorithms.surrogate import Number, RatioLevel, log_ratios, outside_clip, policy_loss, value_loss
from rapidfire_jax.algorithms.train_state import TrainState, gradient_step

ELSEWHERE = {"section": "elsewhere"}  # metadata of fields that a run's configuration sets in another section

Positive = Annotated[int, Gt(0)]
NonNegative = Annotated[float, Ge(0)]


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """What fixes the shape of the computation. Static under jit."""

    epochs: Positive = 1  # passes over the rollouts of an iteration
    minibatches: Positive = 1  # optimiser steps an epoch
    micro_batches: Positive = 1  # parts of a minibatch whose gradients are added up
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: KLEstimator = "k1"
    reward_normalization: Normalization = "none"
    aggregation: Aggregation = "token"
    packing: bool = False  # several rollouts a row in scoring and learning; needs `Rollouts.packing`
    recompute: bool = dataclasses.field(default=False, metadata=ELSEWHERE)  # old log-probabilities from a pass of ours

    temperature_shift: ClassVar[float] = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnlineHParams:
    """Numbers that may change between calls without a new compilation; vmap over them for a sweep.

    Each is a float or a scalar array. None switches off what it belongs to; going from None to a number compiles anew.
    """

    learning_rate: NonNegative = dataclasses.field(default=1e-5, metadata=ELSEWHERE)
    temperature: Annotated[float, Gt(0)] = dataclasses.field(default=1.0, metadata=ELSEWHERE)
    kl_coef: NonNegative = 0.05
    kl_target: Annotated[float, Gt(0)] | None = None  # nats a response; the controller moves kl_coef towards it
    kl_horizon: Annotated[float, Gt(0)] = 10_000.0  # responses
    clip_range: Annotated[float, Gt(0)] = 0.2
    clip_range_high: Annotated[float, Gt(0)] | None = None  # None: as clip_range
    dual_clip: Annotated[float, Gt(1)] | None = None
    entropy_coef: NonNegative = 0.0
    reward_clip: Annotated[float, Gt(0)] | None = None  # scores are clipped to [-reward_clip, reward_clip]
    missing_eos_penalty: NonNegative = 0.0  # subtracted from the score of responses that never ended
    overlong_penalty: NonNegative = 0.0  # subtracted at full length, and in part within overlong_buffer of it
    overlong_buffer: NonNegative = 0.0  # tokens
    target_kl: Annotated[float, Gt(0)] | None = None  # nats a token; a step that would start beyond it ends the epochs
    importance_cap: Annotated[float, Gt(0)] | None = None  # of the sampler's mismatch; needs recompute


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Finished rollouts. B sequences of S tokens: the prompt padded on the left, then T response tokens."""

    tokens: Int[Array, "B S"]
    attention_mask: Bool[Array, "B S"]  # True on real tokens of prompt and response
    mask_t: Bool[Array, "B T"]  # True on response tokens up to and including EOS
    ended: Bool[Array, " B"]  # the response has an EOS
    old_logp_t: Float[Array, "B T"]  # nats, under the policy that sampled
    old_v_t: Float[Array, "B T"] | None = None
    ref_logp_t: Float[Array, "B T"] | None = None  # nats, under the reference policy
    score: Float[Array, " B"] | None = None  # reward of the whole response
    token_reward_t: Float[Array, "B T"] | None = None  # rewards of single tokens, besides the score
    next_v: Float[Array, " B"] | None = None  # value of the state after the last token
    importance_t: Float[Array, "B T"] | None = None  # capped ratio of the trained policy to the sampler
    packing: Packing | None = None  # of `pack_rollouts`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """What one minibatch of a policy loss needs; the same fields as `Rollouts` where they have the same name."""

    inputs: Any  # of `apply`, B rows
    mask_t: Bool[Array, "B T"]
    old_logp_t: Float[Array, "B T"]
    adv_t: Float[Array, "B T"]
    ref_logp_t: Float[Array, "B T"] | None = None  # only for a KL penalty in the loss
    importance_t: Float[Array, "B T"] | None = None


@dataclasses.dataclass(frozen=True)
class OnlineAlgorithm:
    """What makes one algorithm out of the functions of this module, and its section of a run's configuration."""

    config: type[OnlineConfig]
    hparams: type[OnlineHParams]
    targets: Callable[..., tuple[Any, Metrics, RunningStats]]  # (rollouts, inputs, stats, hparams, config)
    loss: Callable[..., tuple[Array, Array, PartialMetrics]]  # (outputs, batch, hparams, config)
    has_critic: bool = False
    objection: Callable[[Any], str | None] = lambda run: None  # what is wrong with a run's configuration
    section: str = "rl"
    online: ClassVar[bool] = True


class Critic(NamedTuple):
    """The value term of a loss: see `rapidfire_jax.algorithms.surrogate.value_loss`."""

    v_t: Float[Array, "B T"]
    old_v_t: Float[Array, "B T"]
    return_t: Float[Array, "B T"]
    clip_range: Number | None
    coef: Number


def surrogate_loss(
    outputs: Any,
    batch: Any,
    hparams: OnlineHParams,
    config: OnlineConfig,
    level: RatioLevel = "token",
    critic: Critic | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], PartialMetrics]:
    """Policy loss - entropy_coef x entropy (+ coef x value loss) (+ kl_coef x KL if `kl_in` is "loss").

    As `(sum, count, metrics)`. Gradients flow to `outputs.logp_t`, `outputs.entropy_t` and `critic.v_t` and vanish
    where `batch.mask_t` is False. Where every token counts alike, all terms and their gradients are one pass over them.
    """
    ref_logp_t = batch.ref_logp_t if config.kl_in == "loss" else None
    if level == "token" and config.aggregation == "token":
        return _in_one_pass(outputs, batch, hparams, config, critic, ref_logp_t)
    return _term_by_term(outputs, batch, hparams, config, level, critic, ref_logp_t)


def _in_one_pass(outputs, batch, hparams, config, critic, ref_logp_t):
    high = hparams.clip_range if hparams.clip_range_high is None else hparams.clip_range_high
    of_critic = {}
    if critic is not None:
        of_critic = {"old_v_t": critic.old_v_t, "return_t": critic.return_t, "value_clip": critic.clip_range}
        of_critic["value_coef"] = critic.coef
    loss = fused_loss(
        outputs.logp_t,
        outputs.entropy_t,
        None if critic is None else critic.v_t,
        mask_t=batch.mask_t,
        old_logp_t=batch.old_logp_t,
        adv_t=batch.adv_t,
        clip_low=hparams.clip_range,
        clip_high=high,
        dual_clip=hparams.dual_clip,
        importance_t=batch.importance_t,
        entropy_coef=hparams.entropy_coef,
        ref_logp_t=ref_logp_t,
        kl_coef=hparams.kl_coef,
        kl_estimator=config.kl_estimator,
        **of_critic,
    )
    metrics: PartialMetrics = {
        "loss/policy": Mean(loss.policy, loss.count),
        "policy/entropy": Mean(loss.entropy, loss.count),
        "policy/approx_kl": Mean(loss.approx_kl, loss.count),
        "policy/clip_fraction": Mean(loss.clipped, loss.count),
        "policy/log_ratio": Mean(loss.log_ratio, loss.count),
        "policy/ratio_max_deviation": Peak(loss.ratio_deviation),
    }
    if critic is not None:
        metrics["loss/value"] = Mean(loss.value, loss.count)
    if ref_logp_t is not None:
        metrics["loss/kl"] = Mean(loss.kl, loss.count)
    return loss.total, loss.count, metrics


def _term_by_term(outputs, batch, hparams, config, level, critic, ref_logp_t):
    mask_t, logp_t = batch.mask_t, outputs.logp_t
    total, count = policy_loss(
        logp_t,
        batch.old_logp_t,
        batch.adv_t,
        mask_t,
        hparams.clip_range,
        clip_range_high=hparams.clip_range_high,
        dual_clip=hparams.dual_clip,
        importance_t=batch.importance_t,
        level=level,
        aggregation=config.aggregation,
    )
    metrics: PartialMetrics = {"loss/policy": Mean(total, count)}
    entropy, _ = aggregate(outputs.entropy_t, mask_t, config.aggregation)
    total = total - hparams.entropy_coef * entropy
    if critic is not None:
        value, _ = value_loss(
            critic.v_t, critic.old_v_t, critic.return_t, mask_t, critic.clip_range, aggregation=config.aggregation
        )
        total = total + critic.coef * value
        metrics["loss/value"] = Mean(value, count)
    if ref_logp_t is not None:
        difference = jnp.where(mask_t, logp_t - jax.lax.stop_gradient(ref_logp_t), 0.0)
        kl_t = kl_estimate(difference, jnp.zeros_like(difference), config.kl_estimator)
        kl, _ = aggregate(kl_t, mask_t, config.aggregation)
        total = total + hparams.kl_coef * kl
        metrics["loss/kl"] = Mean(kl, count)

    log_ratio = log_ratios(jax.lax.stop_gradient(logp_t), batch.old_logp_t, mask_t)
    ratio = jnp.exp(log_ratio)
    outside = outside_clip(
        jnp.exp(log_ratios(jax.lax.stop_gradient(logp_t), batch.old_logp_t, mask_t, level)),
        hparams.clip_range,
        hparams.clip_range_high,
    )
    metrics |= {
        "policy/entropy": Mean(*masked_sum(outputs.entropy_t, mask_t)),
        "policy/approx_kl": Mean(*masked_sum(jnp.expm1(log_ratio) - log_ratio, mask_t)),
        "policy/clip_fraction": Mean(*masked_sum(outside, mask_t)),
        "policy/log_ratio": Mean(*masked_sum(jnp.abs(log_ratio), mask_t)),
        "policy/ratio_max_deviation": Peak(jnp.max(jnp.abs(ratio - 1.0))),
    }
    return total, count, metrics


def policy_batch(rollouts: Rollouts, inputs: Any, adv_t: Float[Array, "B T"], config: OnlineConfig) -> PolicyBatch:
    """The batch of an algorithm without critic."""
    ref_logp_t = rollouts.ref_logp_t if config.kl_in == "loss" else None
    return PolicyBatch(inputs, rollouts.mask_t, rollouts.old_logp_t, adv_t, ref_logp_t, rollouts.importance_t)


def step(
    algorithm: OnlineAlgorithm,
    state: TrainState,
    batch: Any,
    hparams: Any,
    *,
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: Any,
) -> tuple[TrainState, Metrics]:
    """One optimiser step on one minibatch.

    Args:
      algorithm: whose loss.
      state: parameters and optimiser state; gradients are taken for `state.trainable` alone.
      batch: the minibatch, B sequences.
      hparams: traced numbers. An optimiser of `make_optimizer` follows its learning rates; any other optax optimiser
        keeps the rate it was made with.
      apply: forward pass, see the module.
      optimizer: optax transformation.
      config: static settings; B must be a multiple of `config.micro_batches`.

    Returns:
      The new state, and metrics of the minibatch before the step.
    """

    def loss(trainable, part):
        temperature = hparams.temperature + config.temperature_shift
        outputs = apply(state.frozen, trainable, part.inputs, part.mask_t.shape[1], temperature)
        return algorithm.loss(outputs, part, hparams, config)

    return gradient_step(
        state,
        batch,
        loss,
        optimizer=optimizer,
        rates=_rates(state, hparams),
        micro_batches=config.micro_batches,
    )


def _rates(state: TrainState, hparams: Any) -> dict[str, Any]:
    """Learning rates of policy and critic; while the critic warms up, the policy's is 0."""
    rate = hparams.learning_rate
    critic_rate = getattr(hparams, "critic_learning_rate", None)
    warmup = getattr(hparams, "critic_warmup", 0.0)
    return {
        "learning_rate": jnp.where(state.step.astype(jnp.float32) < warmup, 0.0, rate),
        "critic_learning_rate": rate if critic_rate is None else critic_rate,
    }


def update(
    algorithm: OnlineAlgorithm,
    state: TrainState,
    rollouts: Rollouts,
    hparams: Any,
    key: Array,
    *,
    apply: Callable[..., Any],
    encode: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: Any,
) -> tuple[TrainState, Metrics]:
    """`config.epochs` passes over the rollouts, each in a fresh random order cut into `config.minibatches` steps.

    Args:
      algorithm, state, hparams, apply, optimizer, config: see `step`.
      rollouts: complete, with `ref_logp_t` (unless `kl_coef` has no use for it) and `score`; B must be a multiple of
        `config.minibatches`.
      key: orders the rows.

    Returns:
      The new state, and the metrics of the algorithm's targets together with those of `step` averaged over the steps
      taken; `policy/ratio_first` is the largest deviation of a ratio from 1 in the first minibatch, and
      `policy/rollout_mismatch` the mean absolute difference in nats between the sampler's log-probabilities and those
      of training, there.
    """
    inputs, _ = _encoded(state, rollouts, encode, config)
    learner = {"apply": apply, "optimizer": optimizer, "config": config}
    return _update(algorithm, state, rollouts, inputs, hparams, key, **learner)


def _encoded(state, rollouts, encode, config):
    """Inputs of the forward passes, and the length of what they say of each row."""
    packing = rollouts.packing
    if config.packing != (packing is not None):
        raise ValueError(f"packing={config.packing} with rollouts.packing={packing}")
    if packing is None:
        return encode(state.frozen, rollouts.tokens, rollouts.attention_mask), rollouts.mask_t.shape[1]
    if problem := objection(config):
        raise ValueError(problem)
    return encode(state.frozen, packing.tokens(rollouts.tokens), packing.segments), packing.segments.shape[1] - 1


def _update(algorithm, state, rollouts, inputs, hparams, key, *, apply, optimizer, config):
    rows = rollouts.tokens.shape[0] if rollouts.packing is None else rollouts.packing.source.shape[0]
    if rows % config.minibatches:
        raise ValueError(f"{rows} rollouts cannot be cut into {config.minibatches} equal minibatches")
    hparams = dataclasses.replace(hparams, kl_coef=hparams.kl_coef * state.stats.kl_scale)
    batch, objective, stats = algorithm.targets(rollouts, inputs, state.stats, hparams, config)
    if rollouts.packing is not None:
        batch = rollouts.packing.batch(batch)
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, config.epochs))

    def one(state, order):
        minibatch = jax.tree.map(lambda x: x[order], batch)
        return step(algorithm, state, minibatch, hparams, apply=apply, optimizer=optimizer, config=config)

    orders = orders.reshape(config.epochs * config.minibatches, -1)
    if hparams.target_kl is None:
        state, metrics = jax.lax.scan(one, state, orders)
        taken = jnp.ones(len(orders), bool)
        means = jax.tree.map(jnp.mean, metrics)
    else:
        state, metrics, taken = _scan_until(one, state, orders, hparams.target_kl)
        means = {name: masked_mean(values, taken) for name, values in metrics.items()}
        means["policy/steps_taken"] = taken.sum(dtype=jnp.float32)
    if state.loss_scale is not None:
        means |= over_steps(metrics, taken)
    first = {
        "policy/ratio_first": metrics["policy/ratio_max_deviation"][0],
        "policy/rollout_mismatch": metrics["policy/log_ratio"][0],
    }
    if hparams.kl_target is not None and "kl" in objective:
        scale = adapt_kl_coef(
            stats.kl_scale,
            objective["kl"],
            target=hparams.kl_target,
            horizon=hparams.kl_horizon,
            responses=len(rollouts.tokens),
        )
        if state.loss_scale is not None:  # an overflow of one iteration must not stay for good
            scale = jnp.where(jnp.isfinite(scale), scale, stats.kl_scale)
        stats = dataclasses.replace(stats, kl_scale=scale)
        objective["objective/kl_coef"] = jnp.asarray(hparams.kl_coef)
    return dataclasses.replace(state, stats=stats), objective | means | first


def _scan_until(one, state, orders, target_kl):
    """Steps until one would start further than `target_kl` from the sampler; that one is not taken, nor any after it.

    Returns the state, metrics stacked over all steps, and which of them were taken.
    """
    shapes = jax.eval_shape(one, state, orders[0])[1]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def attempt(state, order):
        new, metrics = one(state, order)
        near = ~(metrics["policy/approx_kl"] > target_kl)  # NaN is no reason to end an iteration as if all were well
        return jax.tree.map(lambda a, b: jnp.where(near, a, b), new, state), metrics, near

    def maybe(carry, order):
        state, going = carry
        state, metrics, going = jax.lax.cond(
            going, attempt, lambda state, _: (state, nothing, jnp.zeros((), bool)), state, order
        )
        return (state, going), (metrics, going)

    (state, _), (metrics, taken) = jax.lax.scan(maybe, (state, jnp.ones((), bool)), orders)
    return state, metrics, taken


def learn(
    algorithm: OnlineAlgorithm,
    state: TrainState,
    rollouts: Rollouts,
    hparams: Any,
    key: Array,
    *,
    apply: Callable[..., Any],
    reference: Callable[..., Array],
    encode: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: Any,
) -> tuple[TrainState, Metrics]:
    """Scores the rollouts by the reference (and by the policy, if `config.recompute`), then `update`.

    `rollouts` come with `score`, and may come with `ref_logp_t`. With `recompute`, `policy/rollout_mismatch` is over
    all of them, and `hparams.importance_cap` weights the policy loss of each token by the recomputed over the sampler's
    probability, at most that cap (truncated importance sampling: Yao et al., Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training, 2025).
    """
    inputs, length = _encoded(state, rollouts, encode, config)
    packing, mask_t = rollouts.packing, rollouts.mask_t
    rest = (inputs, length, hparams.temperature + config.temperature_shift)
    of_rollouts = lambda x: x if packing is None else packing.gather(x, mask_t)  # noqa: E731
    if rollouts.ref_logp_t is None:
        rollouts = dataclasses.replace(rollouts, ref_logp_t=of_rollouts(reference(state.frozen, *rest)))
    mismatch = {}
    if hparams.importance_cap is not None and not config.recompute:
        raise ValueError("importance_cap corrects for the sampler, which needs recompute=True to be measured")
    if config.recompute:
        out = apply(state.frozen, state.trainable, *rest)
        logp_t = of_rollouts(out.logp_t)
        difference = jnp.where(mask_t, logp_t - rollouts.old_logp_t, 0.0)
        mismatch["policy/rollout_mismatch"] = masked_mean(jnp.abs(difference), mask_t)
        rollouts = dataclasses.replace(rollouts, old_logp_t=logp_t)
        if algorithm.has_critic:
            next_v = getattr(out, "next_v", None)
            if packing is not None and next_v is not None:
                next_v = packing.gather_next(out.v_t, next_v, mask_t)
            rollouts = dataclasses.replace(rollouts, old_v_t=of_rollouts(out.v_t), next_v=next_v)
        if hparams.importance_cap is not None:
            importance_t = jnp.minimum(jnp.exp(difference), hparams.importance_cap)
            mismatch["policy/importance"] = masked_mean(importance_t, mask_t)
            rollouts = dataclasses.replace(rollouts, importance_t=importance_t)
    learner = {"apply": apply, "optimizer": optimizer, "config": config}
    state, metrics = _update(algorithm, state, rollouts, inputs, hparams, key, **learner)
    return state, metrics | mismatch


def iteration(
    algorithm: OnlineAlgorithm,
    state: TrainState,
    prompts: tuple[Int[Array, "B P"], Bool[Array, "B P"]],
    hparams: Any,
    key: Array,
    *,
    sample: Callable[..., Rollouts],
    reward: Callable[[Rollouts], Array],
    apply: Callable[..., Any],
    reference: Callable[..., Array],
    encode: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: Any,
) -> tuple[TrainState, Metrics]:
    """A whole iteration as one function: rollout, reward, reference, advantages, updates.

    `prompts` are left-padded ids and their mask. Rewards that need the host (text, a server) cannot be traced: call
    `sample` and `learn` yourself then, with the two halves of `jax.random.split(key)`.
    """
    sample_key, learn_key = jax.random.split(key)
    temperature = hparams.temperature + config.temperature_shift
    rollouts = sample(state.frozen, state.trainable, *prompts, sample_key, temperature)
    rollouts = dataclasses.replace(rollouts, score=reward(rollouts))
    learner = {"apply": apply, "reference": reference, "encode": encode, "optimizer": optimizer, "config": config}
    return learn(algorithm, state, rollouts, hparams, learn_key, **learner)
