"""Which tensors of an original MoE-LLaVA checkpoint make up each tensor of the model here.

It knows names and nothing of files, shapes or values.
"""

import re

# The original's names of an MLP's parts, by the text configuration's model type; as here where nothing stands.
_MLP = {
    "moe_llava_phi_text": {"up_proj": "fc1", "down_proj": "fc2"},
    "moe_llava_qwen_text": {"gate_proj": "w2", "up_proj": "w1", "down_proj": "c_proj"},
}
_QWEN = {"embed_tokens": "wte", "norm": "ln_f", "layers": "h"}
_EXPERTS = re.compile(r"(.*\.mlp)\.experts\.(gate_up_proj|up_proj|down_proj)(_bias)?")
_OURS = "model.language_model."
_PROJECTOR = "model.multi_modal_projector."
VISION_TOWER = "model.vision_tower."
# Stored by some versions of transformers, and computed here.
_COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|attn\.(masked_)?bias|logn_tensor)")


class Naming:
    """Names of one family. `text_type`: model type of its text configuration."""

    def __init__(self, text_type: str) -> None:
        self._qwen = text_type == "moe_llava_qwen_text"
        self._prefix = "transformer." if self._qwen else "model."
        self._mlp = _MLP.get(text_type, {})

    def sources(self, name: str, experts: int) -> list[list[str]]:
        """Names in the original for the parameter `name`: to be joined along rows inside a list, and, where there
        are several lists, stacked. `experts`: how many of them the layer has. Not for the vision tower."""
        if name.startswith(_PROJECTOR):
            return [[f"{self._prefix}mm_projector.image_spatial_proj.{name.removeprefix(_PROJECTOR)}"]]
        if not name.startswith(_OURS):
            return [[name]]
        path = name.removeprefix(_OURS)
        fused = _EXPERTS.fullmatch(path)
        if fused is None:
            return [[self._original(path)]]
        mlp, part, bias = fused.groups()
        parts = ["gate_proj", "up_proj"] if part == "gate_up_proj" else [part]
        inside = f"{self._original(mlp)}.deepspeed_moe.experts.deepspeed_experts"
        kind = "bias" if bias else "weight"
        return [[f"{inside}.{e}.{self._mlp.get(part, part)}.{kind}" for part in parts] for e in range(experts)]

    def _original(self, path: str) -> str:
        path = path.replace(".mlp.router.weight", ".mlp.deepspeed_moe.gate.wg.weight")
        path = re.sub(r"\.mlp\.router\.coefficient_(weight|bias)$", r".mlp.coefficient.\1", path)
        parts = path.split(".")
        if "mlp" in parts:
            parts = [self._mlp.get(part, part) for part in parts]
        if self._qwen:
            parts[0] = _QWEN.get(parts[0], parts[0])
        return self._prefix + ".".join(parts)

    def is_ignored(self, name: str) -> bool:
        """Tensors of an original that are not used: its copy of the tower (the tower's own repository has it), and
        what is computed."""
        return name.startswith(f"{self._prefix}image_tower.") or bool(_COMPUTED.fullmatch(name))
