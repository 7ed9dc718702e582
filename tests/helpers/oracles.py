"""Equations of the papers as NumPy loops in float64, one number at a time.

Nothing is shared with the package but names: arrays are `[B, T]` with masks, and what stands where a mask is False is
never read. `hparams` and `config` are those of the algorithms, with plain numbers.
"""

import math

import numpy as np


def slope(f, x, h=1e-6):
    """Gradient of a number by central differences."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        value = x[place]
        x[place] = value + h
        above = f(x)
        x[place] = value - h
        gradient[place] = (above - f(x)) / (2 * h)
        x[place] = value
    return gradient


def steps(mask):
    """For each row, the positions of its tokens."""
    return [[t for t, real in enumerate(row) if real] for row in mask]


def kl(estimator, logp, ref_logp):
    """Schulman 2020, with r = ref / policy; `estimator` without its plus."""
    r = math.exp(ref_logp - logp)
    if estimator == "k1":
        return -math.log(r)
    if estimator == "k2":
        return math.log(r) ** 2 / 2
    return abs(math.log(r)) if estimator == "abs" else (r - 1) - math.log(r)


def aggregate(x, mask, how):
    """DAPO sec. 3.3 (token), GRPO eq. 3 (sequence), Dr. GRPO sec. 3 (fixed), as sum and count."""
    total, count = 0.0, 0
    for row, tokens in zip(x, steps(mask), strict=True):
        if tokens:
            of_row = sum(row[t] for t in tokens)
            total += {"token": of_row, "sequence": of_row / len(tokens), "fixed": of_row / len(row)}[how]
            count += len(tokens) if how == "token" else 1
    return total, count


def ratios(logp, old, mask, level):
    """Importance ratio of each token; GSPO eq. 7 for `sequence`."""
    out = np.ones(np.shape(logp))
    for b, tokens in enumerate(steps(mask)):
        each = [math.exp(logp[b][t] - old[b][t]) for t in tokens]
        whole = math.prod(each)
        for t, ratio in zip(tokens, each, strict=True):
            out[b, t] = {"token": ratio, "sequence": whole ** (1 / len(tokens)), "trajectory": whole}[level]
    return out


def surrogate(logp, old, adv, mask, low, high=None, dual=None, importance=None, level="token", how="token"):
    """Minus the objective of PPO eq. 7, with clip-higher (DAPO), dual clip (Ye et al. eq. 5), truncated IS."""
    high = low if high is None else high
    loss, ratio = np.zeros(np.shape(logp)), ratios(logp, old, mask, level)
    for b, tokens in enumerate(steps(mask)):
        for t in tokens:
            a, r = adv[b][t], ratio[b, t]
            objective = min(r * a, min(max(r, 1 - low), 1 + high) * a)
            if dual is not None and a < 0:
                objective = max(objective, dual * a)
            loss[b, t] = -objective * (1.0 if importance is None else importance[b][t])
    return aggregate(loss, mask, how)


def value(v, old_v, target, mask, clip, how="token"):
    """Half the squared error, the worse one of clipped and not."""
    loss = np.zeros(np.shape(v))
    for b, tokens in enumerate(steps(mask)):
        for t in tokens:
            error = (v[b][t] - target[b][t]) ** 2
            if clip is not None:
                near = min(max(v[b][t], old_v[b][t] - clip), old_v[b][t] + clip)
                error = max(error, (near - target[b][t]) ** 2)
            loss[b, t] = error / 2
    return aggregate(loss, mask, how)


def gae(r, v, mask, gamma, lam, next_v=None):
    """GAE eq. 16 as a sum of discounted residuals; `next_v` follows the last token of each row."""
    adv = np.zeros(np.shape(r))
    for b, tokens in enumerate(steps(mask)):
        values = [v[b][t] for t in tokens] + [0.0 if next_v is None else next_v[b]]
        deltas = [r[b][t] + gamma * values[i + 1] - values[i] for i, t in enumerate(tokens)]
        for i, t in enumerate(tokens):
            adv[b, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    return adv


def returns(r, mask, gamma):
    """Sums of discounted rewards."""
    out = np.zeros(np.shape(r))
    for b, tokens in enumerate(steps(mask)):
        for i, t in enumerate(tokens):
            out[b, t] = sum(gamma**k * r[b][u] for k, u in enumerate(tokens[i:]))
    return out


def whiten(x, mask, keep_mean=False):
    """Mean 0 (or kept) and unbiased variance 1 over the mask."""
    values = [x[b][t] for b, tokens in enumerate(steps(mask)) for t in tokens]
    mean = sum(values) / max(len(values), 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) + 1e-8)
    out = np.zeros(np.shape(x))
    for b, tokens in enumerate(steps(mask)):
        for t in tokens:
            out[b, t] = (x[b][t] - mean) / deviation + (mean if keep_mean else 0.0)
    return out


def group_relative(score, size, scale):
    """GRPO sec. 4.1.2 (std) and Dr. GRPO (none)."""
    out = []
    for start in range(0, len(score), size):
        group = [float(s) for s in score[start : start + size]]
        mean = sum(group) / size
        deviation = math.sqrt(sum((s - mean) ** 2 for s in group) / max(size - 1, 1))
        out += [(s - mean) / ((deviation + 1e-4) if scale == "std" else 1.0) for s in group]
    return np.array(out)


def leave_one_out(score, size):
    """RLOO eq. 8."""
    out = []
    for i, own in enumerate(score):
        first = i // size * size
        others = [float(score[j]) for j in range(first, first + size) if j != i]
        out.append(own - sum(others) / len(others))
    return np.array(out)


def reference_batches(batches):
    """The first batches of a run, up to the one in which scores differ for the first time."""
    count = next((n for n in range(1, len(batches) + 1) if len(set(np.concatenate(batches[:n]).tolist())) > 1), None)
    return batches[:count]


def normalize(batches, how):
    """Scores of each batch over the scores so far, or over those of the first that differ; shifted while none do."""
    out = []
    for i, batch in enumerate(batches):
        so_far = batches[: i + 1]
        seen = np.concatenate(so_far if how == "running" else reference_batches(so_far)).astype(np.float64)
        deviation = math.sqrt(sum((seen - seen.mean()) ** 2) / max(len(seen) - 1, 1))
        scale = deviation + 1e-6 if deviation > 0 else 1.0
        out.append(batch if how == "none" else (batch - seen.mean()) / scale)
    return out


def overlong(length, limit, buffer):
    """Minus DAPO eq. 13."""
    if length <= limit - buffer:
        return 0.0
    return (length - (limit - buffer)) / buffer if length <= limit else 1.0


def response_rewards(score, ended, length, limit, hparams):
    """Clipped scores of responses less what is subtracted from them."""
    out = []
    for s, has_eos, n in zip(score, ended, length, strict=True):
        if hparams.reward_clip is not None:
            s = min(max(s, -hparams.reward_clip), hparams.reward_clip)
        s = s - (0.0 if has_eos else hparams.missing_eos_penalty)
        out.append(s - hparams.overlong_penalty * overlong(n, limit, hparams.overlong_buffer))
    return out


def token_rewards(rollouts, hparams, config):
    """Reward of every token in a run's first iteration."""
    mask = rollouts.mask_t
    lengths = [len(tokens) for tokens in steps(mask)]
    (score,) = normalize([rollouts.score], config.reward_normalization)
    of_response = response_rewards(score, rollouts.ended, lengths, mask.shape[1], hparams)
    out = np.zeros(mask.shape)
    for b, tokens in enumerate(steps(mask)):
        for t in tokens:
            if rollouts.token_reward_t is not None:
                out[b, t] += rollouts.token_reward_t[b, t]
            if config.kl_in == "reward":
                estimator = config.kl_estimator.removesuffix("+")
                out[b, t] -= hparams.kl_coef * kl(estimator, rollouts.old_logp_t[b, t], rollouts.ref_logp_t[b, t])
        if tokens:
            out[b, tokens[-1]] += of_response[b]
    return out


def advantages(name, rollouts, hparams, config):
    """Advantages, and PPO's returns, of an algorithm in a run's first iteration."""
    r, mask = token_rewards(rollouts, hparams, config), rollouts.mask_t
    if name == "ppo":
        r = whiten(r, mask, keep_mean=True) if config.whiten_rewards else r
        next_v = np.where(rollouts.ended, 0.0, rollouts.next_v) if config.bootstrap_truncated else None
        adv = gae(r, rollouts.old_v_t, mask, hparams.gamma, hparams.lam, next_v)
        targets = np.where(mask, adv + np.where(mask, rollouts.old_v_t, 0.0), 0.0)
        return whiten(adv, mask) if config.whiten_advantages else adv, targets
    if name == "reinforce_pp":
        if config.group_size > 1:
            total = r.sum(axis=1)
            for b, tokens in enumerate(steps(mask)):
                first = b // config.group_size * config.group_size
                if tokens:
                    r[b, tokens[-1]] -= total[first : first + config.group_size].mean()
        return whiten(returns(r, mask, hparams.gamma), mask), None
    total = r.sum(axis=1)
    if name == "grpo":
        of_response = group_relative(total, config.group_size, config.scale)
    else:
        of_response = leave_one_out(total, config.group_size)
    return np.where(mask, of_response[:, None], 0.0), None


def online_loss(name, logp, entropy, v, batch, hparams, config):
    """Surrogate - entropy_coef entropy + kl_coef KL + value_coef value loss, as sum and count."""
    mask, how = batch.mask_t, config.aggregation
    clips = hparams.clip_range, hparams.clip_range_high, hparams.dual_clip
    level = getattr(config, "ratio_level", "token")
    total, count = surrogate(logp, batch.old_logp_t, batch.adv_t, mask, *clips, batch.importance_t, level, how)
    total -= hparams.entropy_coef * aggregate(entropy, mask, how)[0]
    if config.kl_in == "loss":
        kls = np.zeros(mask.shape)
        for b, tokens in enumerate(steps(mask)):
            for t in tokens:
                kls[b, t] = kl(config.kl_estimator, logp[b, t], batch.ref_logp_t[b, t])
        total += hparams.kl_coef * aggregate(kls, mask, how)[0]
    if name == "ppo":
        clip = hparams.value_clip_range
        total += hparams.value_coef * value(v, batch.old_v_t, batch.return_t, mask, clip, how)[0]
    return total, count


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def dpo(logp, ref_logp, beta, loss, smoothing):
    """DPO eq. 7, its smoothed form (Mitchell eq. 3), IPO eq. 17; sum over pairs."""
    total = 0.0
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(logp, ref_logp, strict=True):
        h = (chosen - rejected) - (ref_chosen - ref_rejected)
        if loss == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
        else:
            total -= (1 - smoothing) * log_sigmoid(beta * h) + smoothing * log_sigmoid(-beta * h)
    return total


def bradley_terry(score, margin, margin_coef, centre_coef):
    """Stiennon et al. eq. 1 with Llama 2's margin and the centre term of Eisenstein et al.; sum over pairs."""
    return sum(
        -log_sigmoid(chosen - rejected - margin_coef * apart) + centre_coef * (chosen + rejected) ** 2
        for (chosen, rejected), apart in zip(score, margin, strict=True)
    )


def cross_entropy(score, label):
    """Of Bernoulli labels, from log-odds."""
    p = [1 / (1 + math.exp(-s)) for s in score]
    return -sum(y * math.log(q) + (1 - y) * math.log(1 - q) for y, q in zip(label, p, strict=True))
