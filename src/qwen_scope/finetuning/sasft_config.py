"""`SASFTConfig`: TRL's `SFTConfig` and what SASFT adds."""

from dataclasses import dataclass, field

from trl.trainer.sft_config import SFTConfig

from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.old_names import old_names_allowed


@dataclass
class SASFTConfig(SFTConfig):
    """All options of `trl.SFTConfig`, with the same defaults, and those of SASFT (arXiv:2507.14894).

    Args:
        reduce_weight: what the reduction loss is multiplied by before it is added to the cross-entropy; its best value depends
            on how large the pre-activations are. SASFT's code uses 5e-4 to 1e-3 at Qwen's last layers. 0 only reports it.
        token_penalty: what the baseline's penalty is multiplied by: the probability of `penalised_tokens`, on the same tokens
            that restraints hold. 0 leaves it out.
        tag_column: the column of the data set that holds each sample's tag, such as its language.
    """

    reduce_weight: float = field(
        default=5e-4, metadata={"help": "Weight of the reduction loss beside the cross-entropy."}
    )
    token_penalty: float = field(
        default=0.0, metadata={"help": "Weight of the baseline: the probability of the penalised tokens."}
    )
    tag_column: str = field(
        default="language",
        metadata={"help": "Column of the data set that holds each sample's tag, such as its language."},
    )

    def __post_init__(self) -> None:
        with old_names_allowed():
            super().__post_init__()
        for name in ("reduce_weight", "token_penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise QwenScopeError(f"expected {name} of 0 or more, found {getattr(self, name)}; choose such as 5e-4")
