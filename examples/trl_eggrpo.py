"""EG-GRPO for text models: a subclass of TRL's GRPOTrainer with per-token advantages.

    from trl_eggrpo import EGGRPOTrainer                        # then as GRPOTrainer:
    EGGRPOTrainer(model="Qwen/Qwen3-0.6B", reward_funcs=reward, train_dataset=prompts,
                  args=GRPOConfig(loss_type="grpo", ...), low_frac=0.2, high_frac=0.5).train()

Needs torch and examples/requirements.txt; put examples/ on PYTHONPATH. Runs on what TRL runs on;
start several processes with accelerate or torchrun. The batch that lambda is calibrated over is
TRL's generation batch, of all processes: per_device_train_batch_size * steps_per_generation rows of
each. low_frac=0 is the stock trainer, bit for bit (loss_type="grpo", also with gradient
accumulation, LoRA, num_iterations=2 and gradient checkpointing). Settings that change the weight of
a token in the loss are refused, because the bonus is calibrated for a mean over sequences of means
over tokens; so is all that truncates or alters the distribution sampled from, whose entropy counts.

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

# The fields of GRPOConfig (TRL 1.16.0) that change how tokens are sampled or what they weigh in the
# loss, and what they must be. Ratio and clipping, the reference and the scale of A stay free.
NEEDED = dict(
    top_k=(None, 0, -1),
    top_p=(None, 1),
    min_p=(None, 0),
    repetition_penalty=(None, 1),
    generation_kwargs=(None, {}),
    vllm_structured_outputs_regex=(None,),
    neftune_noise_alpha=(None,),
    loss_type=("grpo",),
    importance_sampling_level=("token",),
    off_policy_mask_threshold=(None,),
    top_entropy_quantile=(1,),
    entropy_coef=(0,),
    use_adaptive_entropy=(False,),
)
# What a model's generation_config may hold: TRL sets these, or they leave probabilities alone.
HARMLESS = set(
    "bos_token_id eos_token_id pad_token_id do_sample max_length max_new_tokens use_cache "
    "cache_implementation temperature top_k top_p min_p repetition_penalty transformers_version "
    "_from_model_config".split()
)


class EGGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are shaped by token entropy.

    low_frac, high_frac, kappa: as in objective.py. All else: as GRPOTrainer. Raises ValueError for
    a sampler, loss or model for which the entropies, the calibration or shapes would be wrong.
    """

    def __init__(self, *args, low_frac=0.2, high_frac=0.5, kappa=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.fractions = (low_frac, high_frac)
        self.kappa = kappa
        needed = dict(NEEDED)
        if self.args.use_vllm:
            needed["vllm_importance_sampling_correction"] = (False,)  # it weighs tokens
        for name, allowed in needed.items():
            value = getattr(self.args, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r}: must be {allowed[-1]!r}, because EG-GRPO needs tokens of "
                    "the full distribution, each weighted by 1 over its completion's length"
                )
        for name, value in self.model.generation_config.to_diff_dict().items():
            if value is not False and name not in HARMLESS:
                raise ValueError(f"{name}={value!r} in the model's generation_config: set it None")
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                raise ValueError("dropout: TRL samples with it; set disable_dropout=True")

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
        fraction = low.sum() / valid.sum().clamp(min=1)
        metrics["eg/low_fraction"].append(fraction.item())
        metrics["eg/lambda"].append(objective.bonus_coefficient(*shaping).item())
        shaped = objective.shape_advantages(*shaping).split(rows)[self.accelerator.process_index]
        return shaped[:, :length]

    def _gather_tokens(self, x):
        """Gather (B, T) of every process, T being each one's own longest completion."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1))
