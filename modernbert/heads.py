"""ModernBERT with a head: masked LM, sequence and token classification, questions, choices.

Shapes as in `model.py`; V = vocabulary, N = labels, C = choices. Every head starts with the same
`PredictionHead`, so that fine-tuning starts from the pretrained one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from modernbert import kernels
from modernbert.config import ModernBertConfig
from modernbert.kernels import reference
from modernbert.model import ModernBertModel, ModernBertOutput, as_packed, norm, unpack_output
from modernbert.packing import PackedBatch
from modernbert.pretrained import Output, PreTrainedModel, trunc_normal

IGNORED = -100


@dataclass
class HeadOutput(Output):
    """loss: None without labels; hidden_states, attentions: as in `ModernBertOutput`."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None


class MaskedLMOutput(HeadOutput):
    """logits: (B, L, V), zeros at pads; (T, V) packed; (labelled tokens, V) when sparse."""


class SequenceClassifierOutput(HeadOutput):
    """logits: (B, N)."""


class TokenClassifierOutput(HeadOutput):
    """logits: (B, L, N), zeros at pads; (T, N) packed."""


class MultipleChoiceOutput(HeadOutput):
    """logits: (B, C)."""


@dataclass
class QuestionAnsweringOutput(Output):
    """start_logits, end_logits: (B, L), the lowest number of the dtype at pads; (T,) packed."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None


class PredictionHead(nn.Module):
    """norm(activation(dense(x))), (..., D) to (..., D)."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.activation = config.classifier_activation
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.norm = norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(reference.activate(self.dense(x), self.activation))


class HeadModel(PreTrainedModel):
    """An encoder, a prediction head and, in the classes below, a linear layer."""

    def __init__(self, config: ModernBertConfig, *, attention: str = "auto"):
        super().__init__(config, attention=attention)
        self.model = ModernBertModel(config, attention=attention)
        self.head = PredictionHead(config)

    def encoder(self) -> ModernBertModel:
        return self.model

    def optimize(self, *, linears: str = "auto", fp16_accumulate: bool = False) -> Self:
        """`ModernBertModel.optimize` of the encoder inside; the head stays as it is."""
        self.model.optimize(linears=linears, fp16_accumulate=fp16_accumulate)
        return self

    def reset_parameters(self) -> None:
        """The encoder has done its own; the head is an output-side projection."""
        std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
        trunc_normal(self.head.dense, std, self.config)

    def encode(
        self, inputs: tuple[Any, ...], output_hidden_states: bool, output_attentions: bool
    ) -> tuple[PackedBatch, ModernBertOutput, bool]:
        """Pack, run the encoder: the batch, its packed output, and whether it came packed."""
        batch = as_packed(*inputs, config=self.config)
        output = self.model(
            batch, output_hidden_states=output_hidden_states, output_attentions=output_attentions
        )
        return batch, output, isinstance(inputs[0], PackedBatch)


class ModernBertForMaskedLM(HeadModel):
    """Predicts the vocabulary at each token; the decoder shares the embedding table's weight."""

    def __init__(self, config: ModernBertConfig, *, attention: str = "auto"):
        super().__init__(config, attention=attention)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.initialize()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.decoder.bias is not None:
            nn.init.zeros_(self.decoder.bias)
        if not self.config.tie_word_embeddings:
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            trunc_normal(self.decoder, std, self.config)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.decoder.weight = self.model.embeddings.tok_embeddings.weight

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder, (V, D)."""
        return self.decoder

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        query_only: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> MaskedLMOutput:
        """Inputs as in `ModernBertModel.forward`.

        labels: (B, L), or (T,) for a packed batch; token ids, -100 where there is nothing to
        predict. The loss is the mean cross-entropy over the others, in float32. With
        `config.sparse_prediction` the head and decoder run on the labelled tokens only.
        """
        inputs = (input_ids, attention_mask, position_ids, inputs_embeds, query_only)
        batch, output, packed = self.encode(inputs, output_hidden_states, output_attentions)
        x = output.last_hidden_state  # (T, D)
        if labels is not None:
            labels = _packed_labels(batch, labels, packed)
        sparse = False
        if labels is not None and self.config.sparse_prediction:
            sparse = True
            labelled = labels != self.config.sparse_pred_ignore_index
            x, labels = x[labelled], labels[labelled]
        logits = self.decoder(self.head(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED)
        if not packed:
            output = unpack_output(batch, output)
            logits = logits if sparse else batch.unpack(logits)
        return MaskedLMOutput(loss, logits, output.hidden_states, output.attentions)


class ClassifierModel(HeadModel):
    """A head with a linear layer of `num_outputs` on top."""

    optional: ClassVar[tuple[str, ...]] = ("head", "classifier")

    def __init__(self, config: ModernBertConfig, *, attention: str = "auto"):
        super().__init__(config, attention=attention)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_outputs(config))
        self.initialize()

    @staticmethod
    def num_outputs(config: ModernBertConfig) -> int:
        """Width of the last layer."""
        return config.num_labels

    def reset_parameters(self) -> None:
        super().reset_parameters()
        trunc_normal(self.classifier, self.config.hidden_size**-0.5, self.config)

    def reset_optional(self, names: list[str]) -> None:
        if any(name.startswith("head.") for name in names):
            super().reset_parameters()
            nn.init.ones_(self.head.norm.weight)
            if self.head.norm.bias is not None:
                nn.init.zeros_(self.head.norm.bias)
        trunc_normal(self.classifier, self.config.hidden_size**-0.5, self.config)

    def classify(self, x: Tensor) -> Tensor:
        """(..., D) to (..., num_outputs)."""
        return self.classifier(self.drop(self.head(x)))

    def pooled(
        self, inputs: tuple[Any, ...], output_hidden_states: bool, output_attentions: bool
    ) -> tuple[Tensor, ModernBertOutput]:
        """One row per sequence, (B, D), by `config.classifier_pooling`, and the other outputs.

        For "cls" the last layer computes nothing else, unless its states are asked for.
        """
        batch = as_packed(*inputs, config=self.config)
        if 0 in batch.lengths:
            raise ValueError(
                f"row {batch.lengths.index(0)} of the batch has no token: nothing to pool"
            )
        cls = self.config.classifier_pooling == "cls"
        first_only = cls and not output_hidden_states and not output_attentions
        if self.training and self.config.attention_dropout:
            first_only = False  # that path drops no attention weights
        output = self.model(
            batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            first_only=first_only,
        )
        x = output.last_hidden_state
        if first_only:
            return x, output
        if cls:
            x = x[batch.cu_seqlens[:-1].long()]
        else:
            x = kernels.mean_pool(x, batch.cu_seqlens, batch.query_only)
        return x, output if isinstance(inputs[0], PackedBatch) else unpack_output(batch, output)


class ModernBertForSequenceClassification(ClassifierModel):
    """Scores a whole text: classes, several labels at once, or a number."""

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        query_only: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> SequenceClassifierOutput:
        """Inputs as in `ModernBertModel.forward`.

        labels: by `config.problem_type`, (B,) class ids, (B, N) zeros and ones as floats, or
        (B,) / (B, N) numbers for regression; where the config is silent, one output means
        regression, integer labels classes, floats several labels.
        """
        inputs = (input_ids, attention_mask, position_ids, inputs_embeds, query_only)
        x, output = self.pooled(inputs, output_hidden_states, output_attentions)
        logits = self.classify(x)
        loss = None if labels is None else self.loss(logits, labels)
        return SequenceClassifierOutput(loss, logits, output.hidden_states, output.attentions)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, N); remembers the problem type it inferred in the config."""
        logits = _wide(logits)
        problem = self.config.problem_type
        if problem is None:
            problem = "multi_label_classification"
            if self.config.num_labels == 1:
                problem = "regression"
            elif not labels.is_floating_point():
                problem = "single_label_classification"
            self.config = self.config.replace(problem_type=problem)
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1))
        if labels.numel() != logits.numel():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, the logits {tuple(logits.shape)}: "
                f"{problem} needs one number per logit"
            )
        labels = labels.view(logits.shape).to(logits.dtype)
        if problem == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)


class ModernBertForTokenClassification(ClassifierModel):
    """Scores each token, for named entities and the like."""

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        query_only: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> TokenClassifierOutput:
        """Inputs as in `ModernBertModel.forward`; labels (B, L) or (T,), -100 is left out."""
        inputs = (input_ids, attention_mask, position_ids, inputs_embeds, query_only)
        batch, output, packed = self.encode(inputs, output_hidden_states, output_attentions)
        logits = self.classify(output.last_hidden_state)  # (T, N)
        loss = None
        if labels is not None:
            labels = _packed_labels(batch, labels, packed)
            loss = F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED)
        if not packed:
            output, logits = unpack_output(batch, output), batch.unpack(logits)
        return TokenClassifierOutput(loss, logits, output.hidden_states, output.attentions)


class ModernBertForQuestionAnswering(ClassifierModel):
    """Scores each token as the first and as the last of the answer."""

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        query_only: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> QuestionAnsweringOutput:
        """Inputs as in `ModernBertModel.forward`, without packed ones when there are labels.

        start_positions, end_positions: (B,) places in the row; those outside it are left out.
        The loss is the mean of both cross-entropies, over real tokens only.
        """
        inputs = (input_ids, attention_mask, position_ids, inputs_embeds, query_only)
        batch, output, packed = self.encode(inputs, output_hidden_states, output_attentions)
        start, end = self.classify(output.last_hidden_state).unbind(-1)  # (T,) each
        loss = None
        if not packed:
            output = unpack_output(batch, output)
            lowest = torch.finfo(start.dtype).min
            start, end = (batch.unpack(x, fill=lowest) for x in (start, end))
        if start_positions is not None and end_positions is not None:
            if packed:
                raise ValueError("answers are places in padded rows: pass padded input_ids")
            width = start.shape[1]
            losses = [
                F.cross_entropy(_wide(x), at.view(-1).clamp(0, width), ignore_index=width)
                for x, at in ((start, start_positions), (end, end_positions))
            ]
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, start, end, output.hidden_states, output.attentions)

    @staticmethod
    def num_outputs(config: ModernBertConfig) -> int:
        """Two: first and last token of the answer."""
        if config.num_labels != 2:
            raise ValueError(f"question answering needs num_labels 2, got {config.num_labels}")
        return 2


class ModernBertForMultipleChoice(ClassifierModel):
    """Scores C texts against one another."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        query_only: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> MultipleChoiceOutput:
        """input_ids, attention_mask, ... (B, C, L); labels (B,), the right choice of each row."""
        source = input_ids if input_ids is not None else inputs_embeds
        if source is None or isinstance(source, PackedBatch) or source.dim() < 3:
            raise ValueError("multiple choice needs input_ids of shape (batch, choices, length)")
        choices = source.shape[1]
        given = (input_ids, attention_mask, position_ids, inputs_embeds, query_only)
        flat = tuple(None if x is None else x.flatten(0, 1) for x in given)
        x, output = self.pooled(flat, output_hidden_states, output_attentions)
        logits = self.classify(x).view(-1, choices)
        loss = None if labels is None else F.cross_entropy(_wide(logits), labels)
        return MultipleChoiceOutput(loss, logits, output.hidden_states, output.attentions)

    @staticmethod
    def num_outputs(config: ModernBertConfig) -> int:
        """One score per choice."""
        return 1


def _wide(logits: Tensor) -> Tensor:
    return logits.to(reference.wide(logits.dtype))


def _packed_labels(batch: PackedBatch, labels: Tensor, packed: bool) -> Tensor:
    """Labels (B, L) or (T,) as (T,)."""
    if not packed:
        return batch.flatten(labels)
    if labels.shape != (batch.num_tokens,):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the packed batch {batch.num_tokens} tokens"
        )
    return labels
