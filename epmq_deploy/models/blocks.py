"""The transformer blocks of a model and the linear layers in them."""

from dataclasses import dataclass, replace

# Stream of inputs that are no stream's tokens, such as tables of positions: all rows count alike.
EVERY_TOKEN = "every token"


@dataclass(frozen=True)
class Group:
    """Linear layers that share their input.

    Attributes:
        layers: dotted names.
        norm: dotted name of the LayerNorm or RMSNorm whose output that input is, where there is
            one.
        pooled: only what these layers give for the pooled token reaches the heads.
        stream: whose tokens that input holds, where not its block's: the encoder's output, of which
            cross attention takes keys and values.
        runs: how often each of these layers runs in the block. Only the input of the first run
            holds the stream's tokens; that of others may be a table of positions, as in DeBERTa.
    """

    layers: tuple[str, ...]
    norm: str | None = None
    pooled: bool = False
    stream: str | None = None
    runs: int = 1

    def inside(self, block: str) -> "Group":
        """Return the group with names relative to ``block`` made absolute."""
        norm = None if self.norm is None else f"{block}.{self.norm}"
        return replace(self, layers=tuple(f"{block}.{layer}" for layer in self.layers), norm=norm)


@dataclass(frozen=True)
class Block:
    """One transformer block of the deployed model.

    Attributes:
        name: dotted module name, e.g. ``vision_model.encoder.layers.0``.
        groups: its linear layers, in the order they run.
        norm: dotted name of a norm that runs after all of them, where there is one.
        stream: the sequence of blocks it belongs to, where a model has several (encoder, decoder);
            blocks of one follow each other, each receiving the hidden states that the one before
            gave, and later streams see the finished earlier ones.
        passes_on: outputs besides the hidden states that the next block takes: pairs of the place
            in the output and the place among the arguments after the hidden states.
        repeats: how often it runs in a row, with the same weights each time, as ALBERT's do. Such a
            block is a stream of its own.
        arguments: the block of its stream whose arguments besides hidden states it receives, such
            as the mask of its kind of attention; None for the stream's first block. They do not
            depend on hidden states.
    """

    name: str
    groups: tuple[Group, ...]
    norm: str | None = None
    stream: str = ""
    passes_on: tuple[tuple[int, int], ...] = ()
    repeats: int = 1
    arguments: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers, in the order they run."""
        return tuple(name for group in self.groups for name in group.layers)

    def stream_of(self, group: Group) -> str:
        """Return whose tokens the input of one of its groups holds."""
        return self.stream if group.stream is None else group.stream

    def inner(self, name: str) -> str:
        """Return the name within the block of a module named from the model's root."""
        return name.removeprefix(f"{self.name}.")
