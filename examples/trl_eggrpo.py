"""EG-GRPO for text models: a subclass of TRL's GRPOTrainer with per-token advantages.

    from trl_eggrpo import EGGRPOTrainer                        # then as GRPOTrainer:
    EGGRPOTrainer(model="Qwen/Qwen3-0.6B", reward_funcs=reward, train_dataset=prompts,
                  args=GRPOConfig(loss_type="grpo", ...), low_frac=0.2, high_frac=0.5).train()

Needs torch and examples/requirements.txt; put examples/ on PYTHONPATH. Runs on what TRL runs on;
start several processes with accelerate or torchrun. The batch that lambda is calibrated over is
TRL's generation batch, of all processes: per_device_train_batch_size * steps_per_generation rows of
each. low_frac=0 is the stock trainer, bit for bit (loss_type="grpo", also with gradient
accumulation, LoRA, num_iterations=2 and gradient checkpointing). Other losses are refused: the
bonus is calibrated for a mean over sequences of means over tokens. So is importance sampling by
sequence, which averages over the tokens that are to be told apart. Truncated samplers are refused:
entropies must be those of the distribution sampled from.

Estimates, not measurements: memory is GRPOTrainer's; time is one more forward pass per generation
batch. Run so far: tiny random models on a CPU, one process, and two by torchrun on gloo
(tests/test_examples_trl.py). Not run: real weights, CUDA, vLLM, DeepSpeed, FSDP. Look first at
1. eg/low_fraction in TRL's log: low_frac less rounding, because short completions have few tokens;
2. eg/lambda: the bonus on a token is lambda times its entropy, and may outweigh its advantage;
3. entropy: if it falls to 0 within some 100 steps, raise beta or lower the learning rate;
4. frac_reward_zero_std: groups of equal rewards; TRL divides rounding noise by 1e-4 there.
"""

import importlib.util
import math
from pathlib import Path

import torch
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

# The mathematics by its file: on the path, the repository would hide packages such as evaluate.
spec = importlib.util.spec_from_file_location(
    "objective", Path(__file__).resolve().parents[1] / "objective.py"
)
objective = importlib.util.module_from_spec(spec)
spec.loader.exec_module(objective)

OFF = dict(
    top_k=(0, -1),
    top_p=(1,),
    min_p=(0,),
    repetition_penalty=(1,),
    typical_p=(1,),
    epsilon_cutoff=(0,),
    eta_cutoff=(0,),
    no_repeat_ngram_size=(0,),
)
SET_BY_TRL = ("top_k", "top_p", "min_p", "repetition_penalty")


class EGGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are shaped by token entropy.

    low_frac, high_frac, kappa: as in objective.py. All else: as GRPOTrainer. Raises ValueError for
    a sampler, loss or model for which the entropies, the calibration or shapes would be wrong.
    """

    def __init__(self, *args, low_frac=0.2, high_frac=0.5, kappa=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.fractions = (low_frac, high_frac)
        self.kappa = kappa
        sampler = {
            name: getattr(
                self.args if name in SET_BY_TRL else self.model.generation_config, name, None
            )
            for name in OFF
        }
        for name, value in (sampler | (self.args.generation_kwargs or {})).items():
            if value is not None and value not in OFF.get(name, ()):
                raise ValueError(
                    f"{name}={value}: EG-GRPO needs the full distribution, "
                    "without truncation, penalties or other generation_kwargs"
                )
        if self.args.loss_type != "grpo":
            raise ValueError(
                f"loss_type={self.args.loss_type!r}: EG-GRPO's bonus is calibrated for a mean over "
                "sequences of means over tokens; set loss_type='grpo'"
            )
        level = self.args.importance_sampling_level
        if level != "token":
            raise ValueError(f"importance_sampling_level={level!r}: EG-GRPO needs 'token'")
        if self.args.off_policy_mask_threshold is not None:
            raise ValueError("off_policy_mask_threshold: EG-GRPO needs all sequences in the loss")

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if "pixel_values" in batch:
            raise ValueError("EGGRPOTrainer is for text models: see examples/janus.py for images")
        completion, attention = batch["completion_ids"], batch["completion_mask"]
        valid = (attention * batch.get("tool_mask", 1)).bool()  # (B, T)
        tokens = torch.cat([batch["prompt_ids"], completion], 1)
        mask = torch.cat([batch["prompt_mask"], attention], 1)
        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            _, nats, _ = self._get_per_token_logps_and_entropies(
                self.model,
                tokens,
                mask,
                completion.shape[1],
                self.args.per_device_train_batch_size,
                compute_entropy=True,
            )
        entropy = nats.float() / math.log(self.model.config.get_text_config().vocab_size)
        batch["advantages"] = self._shape_advantages(batch["advantages"], entropy, valid)
        return batch

    def _shape_advantages(self, advantage, entropy, valid):
        """Shape this process's advantages (B,) to (B, T): lambda's sums go over all processes."""
        rows, length = valid.shape  # of this process
        advantage = self.accelerator.gather(advantage)  # (N,) of N = B * processes sequences
        entropy = self._gather_tokens(entropy)  # (N, longest T)
        valid = self._gather_tokens(valid.int()).bool()  # padding makes integers of a bool
        low, high = objective.entropy_masks(entropy, valid, *self.fractions)
        shaping = (advantage, entropy, low, high, valid, self.kappa)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["eg/low_fraction"].append((low.sum() / valid.sum().clamp(min=1)).item())
        metrics["eg/lambda"].append(objective.bonus_coefficient(*shaping).item())
        shaped = objective.shape_advantages(*shaping).split(rows)[self.accelerator.process_index]
        return shaped[:, :length]

    def _gather_tokens(self, x):
        """Gather (B, T) of every process, T being each one's own longest completion."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))
