"""Our loss is TRL's loss, on the same tensors. Skipped where TRL is not installed; it is no
dependency."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from objective import entropy_masks, policy_loss, shape_advantages

trainer = pytest.importorskip("trl.trainer.grpo_trainer")


def trl_loss(logp, old, ref, advantage, valid, beta):
    """Call TRL's own _compute_loss with its network's output replaced by our tensors."""
    stub = MagicMock()
    stub._get_per_token_logps_and_entropies.return_value = (logp, torch.zeros_like(logp), None)
    stub.configure_mock(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        max_completion_length=logp.shape[1],
        current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )
    stub.accelerator.gather.side_effect = stub.accelerator.reduce.side_effect = lambda x, **_: x
    words = torch.zeros_like(logp, dtype=torch.long)
    inputs = dict(
        prompt_ids=words,
        prompt_mask=words,
        completion_ids=words,
        completion_mask=valid.int(),
        advantages=advantage,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
    )
    return trainer.GRPOTrainer._compute_loss(stub, None, inputs)


@pytest.mark.parametrize("method", ["grpo", "eggrpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_policy_loss_is_trls(method, beta):
    """A mean over sequences of means over tokens is what TRL calls grpo; with one update its
    clipping is idle."""
    g = torch.Generator().manual_seed(0)
    logp = (-3 * torch.rand(8, 30, generator=g)).requires_grad_(True)
    ref = logp.detach() + 0.2 * torch.randn(8, 30, generator=g)
    valid = torch.arange(30) < torch.randint(5, 31, (8, 1), generator=g)
    advantage = torch.randn(8, generator=g)
    shaped = advantage[:, None].expand(8, 30)
    if method == "eggrpo":
        entropy = torch.rand(8, 30, generator=g)
        shaped = shape_advantages(advantage, entropy, *entropy_masks(entropy, valid), valid)
    ours, _ = policy_loss(logp, ref if beta else None, shaped, valid, beta)
    theirs = trl_loss(logp, logp.detach(), ref, shaped, valid, beta)
    assert abs(ours.item() - theirs.item()) < 1e-6
    (ours_grad,), (theirs_grad,) = (torch.autograd.grad(x, logp) for x in (ours, theirs))
    assert (ours_grad - theirs_grad).abs().max() < 1e-6 and ours_grad.abs().max() > 1e-3
