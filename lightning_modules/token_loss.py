"""The loss of a language model's labels: by the fused head where the network's head is one matrix product.

Shape suffixes: B rows, T positions with a label or IGNORED, U labels of a decoder, N tokens, C width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from lightning_modules.architectures import HeadInput, find_head_loss
from lightning_modules.losses import IGNORED, Head, HeadLoss, cross_entropy, linear_cross_entropy


def shifted_right(labels_BU: Tensor, start: int, filling: int) -> Tensor:
    """(B, U): what a decoder reads where it has to write the labels; IGNORED becomes `filling`."""
    shifted_BU = labels_BU.new_full(labels_BU.shape, start)
    shifted_BU[:, 1:] = labels_BU[:, :-1]
    return shifted_BU.masked_fill_(shifted_BU == IGNORED, filling)


class TokenLoss:
    """Made once for a network; `keep_only_labels` leaves out positions without a label before the head, which pays
    where most carry none."""

    def __init__(
        self,
        network: PreTrainedModel,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        keep_only_labels: bool = False,
        agreed: Callable[[Callable], HeadLoss | None] = lambda find: find(),
    ):
        """`agreed` is for ranks whose network has no weights to find the rule by."""
        self.tap = HeadInput(network)
        rule = agreed(partial(find_head_loss, network, self.tap))
        self.is_fused = rule is not None
        self.loss = (rule or HeadLoss())._replace(label_smoothing=label_smoothing, z_loss=z_loss)
        self.keep_only_labels = keep_only_labels

    def __call__(
        self, forward: Callable[[], ModelOutput], labels_BT: Tensor, divisor: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(objective / divisor, sum of nats, number of labels) of what the network makes in `forward()`."""
        labels_N = labels_BT.flatten()
        keep_N = labels_N != IGNORED
        hidden_NC, weight, bias, loss = self.head(forward)
        count = keep_N.sum()
        if self.keep_only_labels:
            hidden_NC, labels_N = hidden_NC[keep_N], labels_N[keep_N]
        if weight is None:
            return *cross_entropy(hidden_NC, labels_N, head=loss, divisor=divisor), count
        return *linear_cross_entropy(hidden_NC, weight, labels_N, bias, head=loss, divisor=divisor), count

    def head(self, forward: Callable[[], ModelOutput]) -> Head:
        """What makes the logits of all positions, N = B · T, of what the network makes in `forward()`."""
        if not self.is_fused:
            return Head(forward().logits.flatten(0, 1), loss=self.loss)
        with self.tap.tapped() as tap:
            forward()
        # Not kept: what hangs on it would stay in memory until the next forward pass.
        hidden_NC, tap.hidden = tap.hidden.flatten(0, 1), None
        return Head(hidden_NC, tap.head.weight, tap.head.bias, self.loss)
