"""What text-generation models have in common: no heads, one vocabulary, answers token by token."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.files import uses_settings
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.base import ModelFamily, TypedFamily
from epmq_deploy.models.loading import fill, read_config
from epmq_deploy.models.shared_tokenizer import SharedTokenizer
from epmq_deploy.models.text_generation.special_tokens import SpecialTokens, is_token, until_end
from epmq_deploy.models.tokenizer import open_tokenizer

OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class TextPair:
    """One sample of a text-generation task.

    Attributes:
        text: what the model reads.
        answer: what it should generate.
    """

    text: str
    answer: str


@dataclass(frozen=True)
class CacheShape:
    """Keys and values that a decoder keeps of the tokens it has read.

    Attributes:
        blocks: number of the decoder's blocks; each keeps its own.
        heads: number of key-value heads.
        width: of one head.
    """

    blocks: int
    heads: int
    width: int

    def tensor(self, batch: int, length: int) -> tuple[int, ...]:
        """Return the shape ``[batch, heads, length, width]`` of one block's keys or values."""
        return (batch, self.heads, length, self.width)


@dataclass(frozen=True)
class EncoderDecoderLayout:
    """Dotted module names of an encoder-decoder's parts.

    Attributes:
        embedding: the token embedding that encoder and decoder share.
        encoder: the encoder.
        decoder: the decoder.
        output: the output layer.
        cross_attention: ends of the names of the decoder's layers that take the encoder's output:
            keys and values of cross attention.
    """

    embedding: str
    encoder: str
    decoder: str
    output: str
    cross_attention: tuple[str, ...]

    def encodes(self, layer: str) -> bool:
        """Whether a layer runs when the text is read."""
        return layer == self.embedding or layer.startswith(f"{self.encoder}.")

    def decodes(self, layer: str) -> bool:
        """Whether a layer runs when the answer is generated."""
        return layer in (self.embedding, self.output) or layer.startswith(f"{self.decoder}.")

    def projects_text(self, layer: str) -> bool:
        """Whether a layer takes the encoder's output, which is the same for every new token."""
        return layer.endswith(self.cross_attention)

    def hidden_width(self, model: nn.Module) -> int:
        """Return the width of the hidden states that the encoder passes to the decoder."""
        return int(model.get_submodule(self.embedding).get_parameter("weight").shape[1])


class TextGenerationFamily(TypedFamily):
    """Text-generation models; the whole model is merged and deployed.

    Samples are `TextPair`. For calibration the model reads the answer along with the text ("teacher
    forcing"), so that layers see what they see while it is generated.

    Attributes:
        tokenizer_files: of a tokenizer that is not stored as ``tokenizer.json``.
        encoder_decoder: names of the parts where an encoder reads the texts; None for a decoder
            that continues the text.
        cuts: the side on which texts that are too long are cut.
    """

    modality = "text"
    tokenizer_files: tuple[str, ...] = ("tokenizer.json",)
    encoder_decoder: EncoderDecoderLayout | None = None
    cuts: Literal["left", "right"] = "right"

    @property
    def task_type(self) -> str:
        """Return what the Hugging Face hub calls tasks of this kind."""
        return "text-generation"

    @abstractmethod
    def build(self, config: Any) -> Any:
        """Build the model of ``transformers`` for its config, with weights of any value."""

    @abstractmethod
    def cache_shape(self, model: nn.Module) -> CacheShape:
        """Return the shape of the keys and values that the decoder's blocks keep."""

    @abstractmethod
    def prompts(self, folder: Path, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, int64 ``[B, T]``, to start generating from."""

    @abstractmethod
    def special_tokens(self, folder: Path) -> SpecialTokens:
        """Token ids that control generation.

        Raises:
            RecipeError: the folder's settings do not define them.
        """

    def is_deployed(self, key: str) -> bool:
        """Whether it is a weight: old checkpoints also hold buffers."""
        return not key.endswith("rotary_emb.inv_freq")

    def is_optional(self, key: str) -> bool:
        """Return False: every expert holds the whole model."""
        return False

    def canonical_key(self, key: str) -> str | tuple[str, ...]:
        """Return the stored name."""
        return key

    @uses_settings
    def load(self, folder: Path) -> nn.Module:
        """Load the whole model; the output layer shares the embedding's weight as in the files.

        Raises:
            RecipeError: see ``check_config``; or encoder and decoder have embeddings of their own.
        """
        from transformers import AutoConfig

        self.check_config(folder, read_config(folder))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not is_token(config.pad_token_id, config.vocab_size):
            # It would only say which row of the embedding is not trained.
            config.pad_token_id = None
        model = self.build(config)
        # One module wherever the embedding is used, so that it has one name.
        model.set_input_embeddings(model.get_input_embeddings())
        source = ModelFolder.at(folder)
        stored = Checkpoint.open(source, self.canonical_key, self.tied, self.is_known).tensors
        untied = [copy for copy in self.tied if copy in stored and copy != OUTPUT]
        if untied:
            raise RecipeError(
                f"{folder}: {', '.join(untied)} differs from {self.tied[untied[0]]}, where the "
                "model has one embedding"
            )
        output = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight
        # The stored tensors decide: the settings of some models say otherwise.
        weight = torch.empty_like(embedding) if OUTPUT in stored else embedding
        output.weight = nn.Parameter(weight) if OUTPUT in stored else embedding
        filled: nn.Module = fill(model, folder, self.canonical_key, self.tied)
        return filled

    def generate(
        self, model: nn.Module, folder: Path, texts: Sequence[str], max_tokens: int
    ) -> list[str]:
        """Generate a model's answers, greedily, in torch; see ``generate_ids``."""
        return self.decode(folder, self.generate_ids(model, folder, texts, max_tokens))

    def generate_ids(
        self, model: nn.Module, folder: Path, texts: Sequence[str], max_tokens: int
    ) -> Tensor:
        """Generate the token ids ``[B, T]`` of a model's answers, greedily, in torch.

        Args:
            model: as ``load`` returns it.
            folder: a model folder with a tokenizer.
            texts: that the model reads.
            max_tokens: length of the longest answer.
        """
        device = next(model.parameters()).device
        ids, mask = (value.to(device) for value in self.prompts(folder, texts))
        special = self.special_tokens(folder)
        with torch.inference_mode():
            generated = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                decoder_start_token_id=special.start,
                eos_token_id=list(special.end),
                pad_token_id=special.padding,
            )
        begin = ids.shape[1] if special.start is None else 1
        answers: Tensor = generated[:, begin:]
        return answers

    def decode(self, folder: Path, ids: Tensor) -> list[str]:
        """Return the texts of token ids ``[B, T]`` up to their ends, without special tokens."""
        answers = until_end(ids, self.special_tokens(folder).end)
        texts: list[str] = self.tokenizer(folder).batch_decode(answers, skip_special_tokens=True)
        return texts

    @uses_settings
    def tokenizer(self, folder: Path) -> Any:
        """Return the folder's tokenizer.

        Raises:
            RecipeError: it is missing or does not fit the model.
        """
        config = read_config(folder)
        return _tokenizer(folder, self.tokenizer_files, int(config["vocab_size"]), self.cuts)


def generates_text(family: ModelFamily) -> TypeGuard[TextGenerationFamily]:
    """Whether a family's models generate text instead of predicting classes."""
    return isinstance(family, TextGenerationFamily)


def stacked(
    rows: Sequence[Sequence[int]], padding: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Pad token ids to the longest row; return them and their mask, int64 ``[B, T]``.

    Args:
        rows: token ids of each text.
        padding: id of the padding token.
        left: pad on the left, so that all rows end together.
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(longest - len(row), None) if left else slice(len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.int64)
        mask[index, columns] = 1
    return ids, mask


@lru_cache(maxsize=4)
def _tokenizer(folder: Path, files: tuple[str, ...], vocabulary: int, cuts: str) -> SharedTokenizer:
    tokenizer = open_tokenizer(folder, files, vocabulary, "texts need")
    tokenizer.truncation_side = cuts
    return SharedTokenizer(tokenizer)
