"""The mathematics of GRPO and EG-GRPO: plain tensors in, plain tensors out.

The file imports torch and nothing else of this project: copy it into any other. Rewards (P, G), and
of each sampled token its log-prob and the entropy of the distribution it was sampled from, become a
loss. GRPO is group_advantages and policy_loss. EG-GRPO puts three steps between them: entropy_masks
finds the tokens of low and of high entropy, bonus_coefficient says how large the bonus is, and
shape_advantages takes the advantage from low tokens and gives the bonus to high ones.

Sources: EG-GRPO is arXiv 2604.02355 (docs/method.md says how its rule is known), GRPO is arXiv
2402.03300, the KL estimator is k3 of http://joschu.net/blog/kl-approx.html. One update per batch of
rollouts, as in the released code: the ratio is 1, and nothing is clipped. What differs from the
paper and that code: docs/method.md.

Dimension letters: P prompts per step, G rollouts per prompt, B = P * G sequences, T tokens of a
sequence, V vocabulary.
"""

import math

import torch


def group_advantages(rewards, eps=1e-4):
    """Compare each rollout with the others of its prompt: A = (R - mean) / (std + eps), ddof 1.

    rewards: (P, G). Returns (P, G); a row of equal rewards gives exactly 0, whatever rounding does
    to its mean. Raises ValueError if G < 2.

    >>> group_advantages(torch.tensor([[0.0, 1.0]]), eps=0.0)
    tensor([[-0.7071,  0.7071]])
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, G) with G of at least 2: {tuple(rewards.shape)}")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))  # float64 stays
    mean = rewards.mean(1, keepdim=True)  # (P, 1)
    std = rewards.std(1, keepdim=True)
    advantages = (rewards - mean) / (std + eps)  # (P, G)
    is_equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (P, 1)
    return advantages.masked_fill(is_equal, 0.0)


def normalized_entropy(logp):
    """Entropy as a fraction of its maximum: H = -sum_v p(v) log p(v) / log V. logp: (..., V) log
    probabilities, which may be -inf. Returns (...) in [0, 1]."""
    nats = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)  # 0 log 0 = 0
    return nats / math.log(logp.shape[-1])


@torch.no_grad()
def token_entropy(logits):
    """Entropy of the full next-token distribution as a fraction of log V, its maximum, without
    gradient. logits: (..., V). Returns (...) in [0, 1], in float32 or better. For other trainers:
    here the sampler has computed it, Rollout.entropy."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return normalized_entropy(logits.log_softmax(-1))


def entropy_masks(entropy, valid, low_frac=0.2, high_frac=0.5):
    """Find each row's low-entropy and high-entropy tokens among its n valid ones; one modality.

    entropy: (B, T), valid: (B, T) bool. Of the tokens in ascending order, earlier ones first among
    equals, low is the first floor(low_frac * n) and high the last floor(high_frac * n). Returns
    low, high: (B, T) bool. Raises ValueError if the fractions overlap.

    >>> entropy = torch.tensor([[.30, .10, .80, .20, .60, .50, .70, .40]])
    >>> low, high = entropy_masks(entropy, torch.ones(1, 8, dtype=torch.bool), low_frac=0.25)
    >>> low.nonzero()[:, 1].tolist(), high.nonzero()[:, 1].tolist()
    ([1, 3], [2, 4, 5, 6])
    """
    if not (0 <= low_frac <= 1 and 0 <= high_frac <= 1 and low_frac + high_frac <= 1):
        fractions = f"low_frac {low_frac}, high_frac {high_frac}"
        raise ValueError(f"{fractions}: must lie in [0, 1] and add up to at most 1")
    n = valid.sum(1, keepdim=True)  # (B, 1)

    def count(fraction):  # floor(fraction * n) in integers: in float32, 0.53 * 100 is less than 53
        billionths = int(fraction * 1e9) + 1
        return n * billionths // 10**9

    padded = entropy.masked_fill(~valid, float("inf"))  # (B, T): invalid tokens rank last
    order = padded.argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)  # the inverse permutation
    low = rank < count(low_frac)
    high = rank >= n - count(high_frac)
    return low & valid, high & valid


def bonus_coefficient(advantage, entropy, low, high, valid, kappa=1.0):
    """Calibrate the bonus: a fraction kappa of what exclusion takes away, or would, is spent on it.

        lambda = kappa * sum_i |A_i| n_low,i / T_i  /  sum_i (1 / T_i) sum_{t high} H_t

    Both sums weigh a token as the loss does, by 1 / T_i, and run over all sequences i of a step,
    plan and image together: one lambda for all. T_i counts the valid tokens of sequence i, n_low,i
    those that are low. Arguments: as for shape_advantages. Returns a scalar, 0 if no token is high.
    The example has masks made by hand:

    >>> entropy = torch.tensor([[.1, .4, .2, .5], [.3, .6, .0, .0]])
    >>> low = torch.tensor([[True, False, False, False], [True, False, False, False]])
    >>> high = torch.tensor([[False, True, False, True], [False, True, False, False]])
    >>> valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    >>> bonus_coefficient(torch.tensor([1.0, -2.0]), entropy, low, high, valid)  # 1.25 / .525
    tensor(2.3810)
    """
    length = valid.sum(1).clamp(min=1)  # (B,)
    excluded = advantage.abs() * low.sum(1) / length  # (B,)
    entropy_of_high = torch.where(high, entropy, 0.0).sum(1) / length  # (B,)
    total = entropy_of_high.sum()
    coefficient = kappa * excluded.sum() / total
    return torch.where(total > 0, coefficient, 0.0)


def shape_advantages(advantage, entropy, low, high, valid, kappa=1.0, exclude=True):
    """Turn one advantage per rollout into one per token: exclusion and bonus.

        A_t = [t not low] A + [t high] lambda H_t                 lambda: see bonus_coefficient

    H_t is a number here, without gradient. The bonus is at least 0: it raises the probability of
    the sampled token whatever the sign of A, also in a group of equal rewards.

    advantage: (B,); entropy: (B, T) in [0, 1], when the tokens were sampled; low, high: (B, T)
    bool, see entropy_masks; valid: (B, T) bool, False at padding. The rows are a step's whole
    batch. kappa: at least 0 (paper: in (0, 1]). exclude: False leaves low tokens their advantage.
    Returns (B, T).
    """
    coefficient = bonus_coefficient(advantage, entropy, low, high, valid, kappa)
    a = advantage[:, None].expand_as(entropy)  # (B, T)
    if exclude:
        a = a.masked_fill(low, 0.0)
    return a + torch.where(high, coefficient * entropy, 0.0)


def shape_advantages_released(advantage, entropy, low, high, bonus_coef=0.3, bonus_cap=0.3):
    """Shape advantages as the released code does, which is not the paper's rule.

        d_t = min(bonus_cap |A|, bonus_coef H_t) on high tokens, 0 elsewhere
        A_t = (A + d_t) [t not low]                               d_t never turns the sign of A

    Arguments and result as for shape_advantages.
    """
    a = advantage[:, None]  # (B, 1)
    cap = bonus_cap * a.abs()
    bonus = torch.minimum(cap, bonus_coef * entropy)  # (B, T)
    raised = a + torch.where(high, bonus, 0.0)
    return raised.masked_fill(low, 0.0)


def policy_loss(logp, logp_ref, advantage, valid, beta=0.01, sequences=None):
    """The objective of GRPO: a mean over sequences of means over tokens, with a KL term on all.

        loss    = -(1/B) sum_i (1/T_i) sum_t [ ratio_t A_t - beta KL_t ]
        ratio_t = exp(logp - logp_old), which is 1 here; its gradient is that of logp
        KL_t    = exp(ref - logp) - (ref - logp) - 1                   the k3 estimator

    logp, logp_ref, advantage: (B, T); valid: (B, T) bool, of which row i has T_i. logp_ref may be
    None if beta is 0. sequences: B of the whole batch, if these rows are a micro-batch of it.
    Returns two scalars, loss and kl, which add up over micro-batches to the batch's means; kl has
    no gradient. The average is the paper's, and the first GRPO's (arXiv 2402.03300); the released
    code pools all tokens of a batch, as DAPO does, so that long sequences weigh more.
    """
    if sequences is None:
        sequences = len(valid)
    length = valid.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    weight = valid / (length * sequences)  # (B, T)
    # One update per batch of rollouts: sampler and learner are one policy, and logp_old is logp
    # itself. That this is so is checked where logp is compared with the rollout's log-probs.
    log_ratio = torch.where(valid, logp - logp.detach(), 0.0)  # padding may be anything, even NaN
    ratio = log_ratio.exp()
    advantage = torch.where(valid, advantage, 0.0)
    gain = ratio * advantage
    kl = torch.zeros_like(ratio)
    if logp_ref is not None:
        log_ratio_ref = torch.where(valid, logp_ref - logp, 0.0)
        kl = log_ratio_ref.exp() - log_ratio_ref - 1
    if beta:  # 0 times a KL that overflows would be NaN
        gain = gain - beta * kl
    loss = -(gain * weight).sum()
    mean_kl = (kl.detach() * weight).sum()
    return loss, mean_kl
