"""The bundled model's vision tower: EfficientNet-Lite0 with four strides joined and read in context.

Architecture: Tan & Le, "EfficientNet" (arXiv:1905.11946, table 1) in the Lite variant (no squeeze-excitation,
ReLU6, stem and head not scaled). The last stride-16 map is folded 2x2 into channels and joined with the
stride-32 map, so each image token keeps fine detail (letters) and wide context (objects). Where the configuration has
`num_hidden_layers`, a branch of convolutions adds what the stride-8 map tells of smaller letters, and the stride-2 map
of their strokes; that many transformer layers then let every token look at all others (a bar at its axis, a letter at
its word).
It knows nothing of language: what a token means is the connector's business.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

# (expand ratio, channels, repeats, stride of the first, kernel) for the seven stages of table 1.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STROKES_STAGE, STROKES_FOLD = 0, 16  # the last stage at a sixteenth of a token, and its positions along its side
DETAIL_STAGE, DETAIL_FOLD = 2, 4  # the last stage at a quarter of one
FINE_STAGE, FINE_FOLD = 4, 2  # the last at half of one
STROKES_SIZE = STROKES_FOLD**2 * STAGES[STROKES_STAGE][1]
DETAIL_SIZE = DETAIL_FOLD**2 * STAGES[DETAIL_STAGE][1] + STROKES_SIZE
COARSE_SIZE = FINE_FOLD**2 * STAGES[FINE_STAGE][1] + STAGES[-1][1]
JOINED_SIZE = COARSE_SIZE + DETAIL_SIZE
FIRST_LAYERS = 4  # of transformer layers; those that follow came later


class TesseraVisionConfig(PretrainedConfig):
    """Shape of the tower.

    `image_size` in pixels; `patch_size` is the total stride, one token a patch. Without transformer layers
    (`num_hidden_layers` 0) `hidden_size` is `JOINED_SIZE`, the width of the four maps together. `detail_residuals`:
    whether the branch for detail has residual blocks.
    """

    model_type = "tessera_vision"
    base_config_key = "vision_config"

    image_size: int = 384
    patch_size: int = 32
    stem_channels: int = 32
    batch_norm_eps: float = 1e-3
    initializer_range: float = 0.02
    hidden_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    detail_residuals: bool = False

    @property
    def side(self) -> int:
        """Image tokens in a row, and rows."""
        return self.image_size // self.patch_size


def _padding(kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's "SAME" padding of sizes that the stride divides; where it is uneven, the extra row is the last."""
    total = kernel - stride
    return (total // 2, total - total // 2, total // 2, total - total // 2)


class Norm(nn.BatchNorm2d):
    """Batch norm whose statistics may be stored in another dtype than the picture is computed in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(x)
        values = (self.running_mean, self.running_var, self.weight, self.bias)
        return functional.batch_norm(x, *(value.to(x.dtype) for value in values), eps=self.eps)


class ConvNorm(nn.Module):
    """Convolution with "SAME" padding, batch norm and an optional ReLU6."""

    def __init__(self, config, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act=True):
        super().__init__()
        self.pad = _padding(kernel, stride)
        # A symmetric pad goes into the convolution itself, which is faster than padding first.
        symmetric = self.pad[0] == self.pad[1]
        self.pointwise = kernel == stride == groups == 1
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, self.pad[0] if symmetric else 0, groups=groups, bias=False
        )
        self.pad = None if symmetric else self.pad
        self.norm = Norm(outputs, eps=config.batch_norm_eps, momentum=0.01)
        self.act = nn.ReLU6(inplace=True) if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pointwise:
            # A matrix product over channels-last pixels: several times the speed of a convolution on CPUs.
            y = functional.linear(x.permute(0, 2, 3, 1), self.conv.weight.flatten(1))
            return self.act(self.norm(y.permute(0, 3, 1, 2)))
        if self.pad is not None:
            x = functional.pad(x, self.pad)
        if not self.conv.weight.requires_grad:
            return self.act(self.norm(self.conv(x)))
        with torch.autocast(x.device.type, enabled=False):  # depthwise convolutions train slowly in 16 bit on CPUs
            y = self.conv(x.to(self.conv.weight.dtype))
        return self.act(self.norm(y))


class MBConv(nn.Module):
    """Inverted residual block without squeeze-excitation."""

    def __init__(self, config, inputs: int, outputs: int, expand: int, stride: int, kernel: int):
        super().__init__()
        width = inputs * expand
        self.expand = ConvNorm(config, inputs, width, 1) if expand != 1 else nn.Identity()
        self.depthwise = ConvNorm(config, width, width, kernel, stride, groups=width)
        self.project = ConvNorm(config, width, outputs, 1, act=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Residual(nn.Module):
    """Two convolutions added to what comes in, `[B, width, height, width]`; untrained they add nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class Detail(nn.Module):
    """`[B, side * side, DETAIL_SIZE]` → `[B, side * side, hidden_size]`: what the stride-8 map and, finer, the stride-2
    map tell of every token.

    Untrained it tells nothing, and trained before it knew the finer map or had `refine` it tells what it told (the last
    layer of each is zero), so a tower from before any of them is the same with it.
    """

    def __init__(self, config: TesseraVisionConfig, width: int = 128, strokes: int = 48):
        super().__init__()
        channels, finest = STAGES[DETAIL_STAGE][1], STAGES[STROKES_STAGE][1]
        self.side = config.side
        self.strokes = nn.Sequential(
            nn.GroupNorm(1, finest),
            nn.Conv2d(finest, strokes, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(strokes, width, 3, stride=2, padding=1),
        )
        self.norm = nn.GroupNorm(1, channels)
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        blocks = (Residual(width), Residual(2 * width)) if config.detail_residuals else (nn.Identity(), nn.Identity())
        self.refine = nn.ModuleList(blocks)
        self.proj = nn.Linear(2 * width * FINE_FOLD**2, config.hidden_size)

    def _map(self, tokens: torch.Tensor, fold: int) -> torch.Tensor:
        """`[B, side * side, channels * fold * fold]` → `[B, channels, side * fold, side * fold]`."""
        return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (self.side, self.side)), fold)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        eighth, half = x.split((DETAIL_SIZE - STROKES_SIZE, STROKES_SIZE), dim=-1)
        x = self.conv(self.norm(self._map(eighth, DETAIL_FOLD))) + self.strokes(self._map(half, STROKES_FOLD))
        x = self.refine[0](functional.gelu(x))
        x = self.refine[1](functional.gelu(self.down(x)))
        return self.proj(functional.pixel_unshuffle(x, FINE_FOLD).flatten(2).transpose(1, 2))


class Context(nn.Module):
    """`[B, side * side, JOINED_SIZE]` → `[B, side * side, hidden_size]`: tokens in their place and context."""

    def __init__(self, config: TesseraVisionConfig):
        super().__init__()
        self.norm = nn.LayerNorm(COARSE_SIZE)
        self.proj = nn.Linear(COARSE_SIZE, config.hidden_size)
        self.detail = Detail(config)
        self.row_embed = nn.Parameter(torch.zeros(config.side, 1, config.hidden_size))
        self.column_embed = nn.Parameter(torch.zeros(1, config.side, config.hidden_size))
        layer = SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList(SiglipEncoderLayer(layer) for _ in range(config.num_hidden_layers))

    @property
    def silent(self) -> list[nn.Module]:
        """What adds to tokens at the end of a branch that came later, and is zero until it is taught: a tower from
        before it reads pictures as it did."""
        refine = [block.net[-1] for block in self.detail.refine if isinstance(block, Residual)]
        later = [part for layer in self.layers[FIRST_LAYERS:] for part in (layer.self_attn.out_proj, layer.mlp.fc2)]
        return [self.detail.proj, self.detail.strokes[-1], *refine, *later]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        coarse, detail = x.split((COARSE_SIZE, DETAIL_SIZE), dim=-1)
        x = self.proj(self.norm(coarse)) + self.detail(detail) + (self.row_embed + self.column_embed).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, None)
        return x


class TesseraVisionModel(PreTrainedModel):
    """`pixel_values [B, 3, image_size, image_size]` → one hidden state `[B, tokens, hidden_size]`."""

    config_class = TesseraVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["MBConv"]
    supports_gradient_checkpointing = False

    def __init__(self, config: TesseraVisionConfig):
        super().__init__(config)
        self.stem = ConvNorm(config, 3, config.stem_channels, 3, 2)
        stages, channels = [], config.stem_channels
        for expand, outputs, repeats, stride, kernel in STAGES:
            blocks = []
            for index in range(repeats):
                blocks.append(MBConv(config, channels, outputs, expand, stride if index == 0 else 1, kernel))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.context = Context(config) if config.num_hidden_layers else nn.Identity()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Context):  # asked here because modules without weights of their own are passed over
            for last in module.silent:
                init.zeros_(last.weight)
                init.zeros_(last.bias)

    def joined(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, 3, image_size, image_size]` → the four maps together, without context, `[B, tokens, JOINED_SIZE]`."""
        x, *detail = self._finest(pixel_values)
        for index in range(DETAIL_STAGE + 1, len(self.stages)):
            x = self.stages[index](x)
            if index == FINE_STAGE:
                fine = functional.pixel_unshuffle(x, FINE_FOLD)  # (B, 4 * 112, H/32, W/32)
        return torch.cat((fine, x, *detail), dim=1).flatten(2).transpose(1, 2)

    def finest(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, 3, image_size, image_size]` → what `Detail` reads, the end of `joined`, `[B, tokens, DETAIL_SIZE]`."""
        return torch.cat(self._finest(pixel_values)[1:], dim=1).flatten(2).transpose(1, 2)

    def _finest(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The map after `DETAIL_STAGE`, that map folded and that after `STROKES_STAGE` folded."""
        x = self.stem(pixel_values.to(self.stem.conv.weight.dtype))
        for index, stage in enumerate(self.stages[: DETAIL_STAGE + 1]):
            x = stage(x)
            if index == STROKES_STAGE:
                strokes = functional.pixel_unshuffle(x, STROKES_FOLD)  # (B, 256 * 16, H/32, W/32)
        return x, functional.pixel_unshuffle(x, DETAIL_FOLD), strokes  # the second (B, 16 * 40, H/32, W/32)

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True, **kwargs) -> BaseModelOutput:
        x = self.norm(self.context(self.joined(pixel_values)))
        return BaseModelOutput(last_hidden_state=x, hidden_states=(x,))


def imagenet_state_dict(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of the published EfficientNet-Lite0 checkpoint; its classifier head is dropped."""
    renamed = {"stem.conv.weight": original["_conv_stem.weight"]}
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    renamed |= {f"stem.norm.{name}": original[f"_bn0.{name}"] for name in statistics}
    block = 0
    for stage, (expand, _, repeats, _, _) in enumerate(STAGES):
        for index in range(repeats):
            norms = iter(("_bn0", "_bn1", "_bn2") if expand != 1 else ("_bn1", "_bn2"))
            for part in ("expand", "depthwise", "project") if expand != 1 else ("depthwise", "project"):
                norm, target = next(norms), f"stages.{stage}.{index}.{part}"
                renamed[f"{target}.conv.weight"] = original[f"_blocks.{block}._{part}_conv.weight"]
                renamed |= {f"{target}.norm.{n}": original[f"_blocks.{block}.{norm}.{n}"] for n in statistics}
            block += 1
    return renamed


AutoConfig.register(TesseraVisionConfig.model_type, TesseraVisionConfig, exist_ok=True)
AutoModel.register(TesseraVisionConfig, TesseraVisionModel, exist_ok=True)
