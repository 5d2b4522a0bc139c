"""What a run can be: every method, baseline and ablation is some values of one config.

One loop, one loss and one set of tests serve them all (eggrpo.py). The paper's values stand beside
ours where they differ, or where a reader would look for them.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import runtime


class Method(NamedTuple):
    about: str
    values: dict       # of Config's fields


NOTHING = dict(low_frac=0.0, bonus_coef=0.0)            # nothing masked, no bonus: GRPO
METHODS = {                                             # one loop, one loss, one set of tests
    "grpo": Method("one advantage for every token", NOTHING),
    "eggrpo": Method("the paper: exclusion and bonus, plan and image", {}),
    "eggrpo-text": Method("the paper's ablation: shaping on the plan only", dict(shaped="plan")),
    "eggrpo-image": Method("the paper's ablation: shaping on the image only", dict(shaped="image")),
    "bonus": Method("one half of the method: the bonus", dict(low_frac=0.0)),
    "exclude": Method("one half of the method: exclusion", dict(bonus_coef=0.0)),
    "eggrpo-gradient": Method("exclusion, and for the bonus a true entropy gradient on high tokens",
                              dict(bonus_coef=0.0, entropy_coef=0.01)),
    "top-entropy": Method("the 80/20 rule: reward gradient on the 20 % highest-entropy tokens only",
                          dict(low_frac=0.8, high_frac=0.2, bonus_coef=0.0)),
    "entropy-coef": Method("GRPO and an entropy gradient on all tokens",
                           dict(NOTHING, high_frac=1.0, entropy_coef=0.01)),
    "calm": Method("ours, the reverse: no reward gradient on the more entropic half of the image",
                   dict(shaped="image", reverse=True, low_frac=0.5, bonus_coef=0.0)),
    "dr-grpo": Method("Dr. GRPO: no division by the std, constant denominator",
                      dict(NOTHING, no_std=True, constant_denominator=True)),
    "dapo": Method("DAPO: clip-higher (.2, .28), groups without variance dropped from the loss",
                   dict(NOTHING, clip_high=0.28, drop_constant=True)),
    "released": Method("the released code's strict thresholds", dict(threshold="released")),
}


@dataclass(frozen=True)
class Config:
    preset: str = ""              # smoke, cpu or gpu
    device: str = "auto"
    out: str = "out"
    seed: int = 0
    method: str = "eggrpo"        # a key of METHODS, which sets some of the fields below
    name: str = ""                # of the run's folder; default: <method>-<seed>
    steps: int = 300              # batches of rollouts (paper: 1600)
    prompts: int = 8              # P (paper: 16)
    group: int = 8                # plans a prompt (paper: 8)
    images_per_plan: int = 1      # pictures a plan; all of a prompt's are one group of G (paper: 1)
    lr: float = 3e-4              # constant after 10 steps (paper: 1e-6, for 7 B parameters)
    beta: float = 0.01            # weight of the KL term (paper: .01)
    low_frac: float = 0.2         # share of tokens without reward gradient (paper: .2)
    high_frac: float = 0.5        # share of tokens with a bonus (paper: .5)
    bonus_coef: float = 0.3       # bonus per unit of entropy (paper: .3)
    bonus_cap: float = 0.3        # largest bonus as a share of |A| (paper: .3)
    shaped: str = "both"          # modality that is shaped: both, plan or image (paper: both)
    threshold: str = "rank"       # rank, or released: strict thresholds (paper: released)
    reverse: bool = False         # rank entropies the other way round (paper: no)
    entropy_coef: float = 0.0     # weight of an entropy gradient on high tokens (paper: none)
    no_std: bool = False          # advantages without division by the std (paper: divided)
    constant_denominator: bool = False  # divide by all slots, not by valid tokens (paper: valid)
    drop_constant: bool = False   # leave groups without variance out of the loss (paper: kept)
    clip_low: float = 0.2         # ratio clipping; without effect at one update a batch (paper: .2)
    clip_high: float = 0.2        # (paper: .2)
    reward: str = "mean"          # mean of REWARDS, or exact: 1 where all is right, else 0
    text_weight: float = 1.0      # what a plan token counts, an image token counting 1 (paper: 1)
    guidance: float = 1.0         # of the policy, sampled and scored (paper: 5, sampled only)
    score_guidance: float = 0.0   # in scoring alone, for study; 0: as sampled (paper: 1)
    inner_epochs: int = 1         # times that a batch of rollouts is gone through (paper: 1)
    minibatches: int = 1          # updates each time (paper: 1)
    micro_batch: int = 16         # sequences a forward pass: memory, never results
    eval_every: int = 50          # steps between held-out evaluations, each with a gallery
    eval_prompts: int = 192       # of each split: usual and rare pairs
    save_every: int = 25

    def check(self):
        flag = lambda name: f"--{name.replace('_', '-')} {getattr(self, name)}"
        require = runtime.require
        require(self.group >= 2, f"{flag('group')}: rollouts are compared, at least 2 are needed")
        fractions = min(self.low_frac, self.high_frac) >= 0 and self.low_frac + self.high_frac <= 1
        require(fractions, f"{flag('low_frac')} and {flag('high_frac')} must lie in [0, 1] and add "
                "up to at most 1")
        runtime.require_at_least(
            1, self, "steps", "prompts", "images_per_plan", "inner_epochs", "minibatches",
            "micro_batch", "eval_every", "eval_prompts", "save_every")
        runtime.require_at_least(0, self, "seed")
        for name in ("lr", "beta", "bonus_coef", "bonus_cap", "clip_low", "clip_high",
                     "text_weight", "entropy_coef", "score_guidance"):
            require(0 <= getattr(self, name) < math.inf, f"{flag(name)}: must be 0 or more, finite")
        require(self.bonus_cap <= 1, f"{flag('bonus_cap')}: above 1 it would flip signs")
        require(math.isfinite(self.guidance), f"{flag('guidance')}: must be finite")
        require(not self.score_guidance or self.inner_epochs * self.minibatches == 1,
                f"{flag('score_guidance')}: allows one update a batch, as in the released code")
        require(self.sequences % self.minibatches == 0,
                f"{flag('minibatches')} does not divide the {self.sequences} sequences of a batch")
        require(re.fullmatch(r"[\w.-]*\w", self.name or "a"),
                f"--name {self.name!r}: letters, digits, '_', '-' and '.' only")
        for name, choices in (("shaped", ("both", "plan", "image")),
                              ("threshold", ("rank", "released")),
                              ("reward", ("mean", "exact"))):
            require(getattr(self, name) in choices, f"{flag(name)}: choose {' or '.join(choices)}")

    @property
    def sequences(self):
        """B = P * G, with G = plans a prompt times pictures a plan."""
        return self.prompts * self.group * self.images_per_plan


PRESETS = {
    "smoke": dict(steps=4, prompts=2, group=4, eval_every=2, eval_prompts=12),
    "cpu": dict(),
    "gpu": dict(steps=600, prompts=16, group=16, lr=1e-4, micro_batch=64, eval_prompts=420),
}
