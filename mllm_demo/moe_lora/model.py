"""MoE-LoRA as a PEFT tuner: puts experts on the target modules, gives each site its router, runs the state.

It does not know what a picture, a chat or a training loop is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from .config import MoeLoraConfig
from .layer import MERGE_REFUSED, MoeLoraLayer
from .router import MoeLoraRouter, RouterSite
from .state import RoutingState, model_input

_CONTEXT_FIELDS = ("attention_mask", "modality_ids", "prompt_mask")


class MoeLoraModel(BaseTuner):
    """
    Creates a MoE-LoRA model from a base model; see [`MoeLoraConfig`] for the mathematics.

    What routers need beyond a layer's input comes from forward hooks on the base model until `unload()`.
    State belongs to this instance alone: one forward at a time per model, gradient checkpointing with
    `use_reentrant=False`.

    Example:

        ```py
        >>> config = MoeLoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], router_scope="block")
        >>> model = get_peft_model(base_model, config)
        >>> loss = model(**batch).loss + config.router_aux_loss_coef * model.base_model.router_aux_loss()
        ```
    """

    uses_shared_state: bool = True
    prefix: str = "lora_"
    tuner_layer_cls = MoeLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ---- injection

    def _pre_injection_hook(self, model: nn.Module, config: MoeLoraConfig, adapter_name: str) -> None:
        self._state = RoutingState()
        self._sites: dict[str, list[RouterSite]] = {}
        self._decoder_path = _decoder_path(model)

    def _post_injection_hook(self, model: nn.Module, config: MoeLoraConfig, adapter_name: str) -> None:
        decoder = model.get_submodule(self._decoder_path)
        self._hooks = [
            model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            model.register_forward_hook(self._end_forward, always_call=True),
            decoder.register_forward_pre_hook(self._capture_prompt, with_kwargs=True),
        ]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        # A router's site is known only now that all its modules are.
        self._attach_routers(adapter_name, torch.device("meta") if low_cpu_mem_usage else nullcontext())

    @staticmethod
    def _check_target_module_exists(peft_config: MoeLoraConfig, key: str):
        """As PEFT does, for `target_modules` and for `plain_target_modules`."""
        experts = check_target_module_exists(peft_config, key)
        plain = _is_plain_target(peft_config, key)
        if experts and plain:
            raise ValueError(f"Module {key!r} matches both `target_modules` and `plain_target_modules`.")
        return experts or plain or experts

    def _create_and_replace(
        self,
        peft_config: MoeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plain = _is_plain_target(peft_config, current_key)
        dtype = self._kept_dtype(peft_config, plain)
        if isinstance(target, MoeLoraLayer):
            target.update_layer(adapter_name, peft_config, plain, dtype)
            return
        if not isinstance(target, nn.Linear):
            raise TypeError(
                f"Target module {current_key!r} must be a torch.nn.Linear (or bitsandbytes' Linear4bit, "
                f"Linear8bitLt), got {type(target).__name__}."
            )
        layer = MoeLoraLayer(target, adapter_name, peft_config, plain, dtype)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _kept_dtype(self, config: MoeLoraConfig, plain: bool) -> torch.dtype | None:
        """What an adapter's weights are kept in; None: whatever PEFT casts them to."""
        in_model_dtype = config.adapter_dtype == "model" or config.experts_in_4bit
        if plain or not in_model_dtype:
            return torch.float32 if in_model_dtype else None
        return self.model.get_input_embeddings().weight.dtype

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        config = self.peft_config[adapter_name]
        if config.adapter_dtype != "model" and not config.experts_in_4bit:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for module in self.model.modules():
            if isinstance(module, MoeLoraLayer):
                module._move_adapter_to_device_of_base_layer(adapter_name)

    def _attach_routers(self, adapter_name: str, init_context) -> None:
        config = self.peft_config[adapter_name]
        members: dict[str, list[tuple[str, MoeLoraLayer]]] = {}
        for key, module in self.model.named_modules():
            if isinstance(module, MoeLoraLayer) and module.num_experts.get(adapter_name, 0) > 0:
                members.setdefault(self._site_name(key, config.router_scope), []).append((key, module))

        trainable = adapter_name in self.active_adapters and not config.inference_mode
        sites = []
        for site_name, modules in members.items():
            key, owner = self._router_owner(modules)
            in_features = owner.in_features
            if config.router_input == "prompt_mean":
                in_features = self.model.get_input_embeddings().weight.shape[-1]
            with init_context:
                router = MoeLoraRouter(
                    config,
                    in_features,
                    site_name=site_name,
                    layer_idx=self._layer_path(key)[1],
                    block=self._block(key, config.router_scope),
                    adapter_name=adapter_name,
                )
            if config.adapter_dtype == "model":
                router.kept_dtype = self._kept_dtype(config, plain=False)
            device = owner.get_base_layer().weight.device
            if router.weight.is_meta:
                router.empty_gate = router.empty_gate.to(device)
            else:
                router.to(device, router.kept_dtype)
            router.requires_grad_(trainable).train(owner.training)
            owner.lora_router[adapter_name] = router
            site = RouterSite(router, config.r, self._state, in_decoder=self._in_decoder(key))
            for _, module in modules:
                module.router_sites[adapter_name] = site
            sites.append(site)
        self._sites[adapter_name] = sites

    def _router_owner(self, modules: list[tuple[str, MoeLoraLayer]]) -> tuple[str, MoeLoraLayer]:
        """The module likely to run first: the first defined that has hidden_size inputs, else the first."""
        config = getattr(self.model, "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        hidden_size = getattr(text_config, "hidden_size", None)
        for key, module in modules:
            if self._in_decoder(key) and module.in_features == hidden_size:
                return key, module
        return modules[0]

    # ---- where a module is

    def _layer_path(self, key: str) -> tuple[str | None, int]:
        """Path and index of the layer (in a `ModuleList`) that holds module `key`; (None, -1) if none."""
        module, path = self.model, []
        for part in key.split("."):
            is_layer = isinstance(module, nn.ModuleList)
            module = getattr(module, part)
            path.append(part)
            if is_layer:
                return ".".join(path), int(part)
        return None, -1

    def _site_name(self, key: str, scope: str) -> str:
        parent = key.rpartition(".")[0]
        layer, _ = self._layer_path(key)
        if scope == "module":
            return key
        if scope == "block" or layer is None:
            return parent
        return layer if scope == "layer" else layer.rpartition(".")[0]

    def _in_decoder(self, key: str) -> bool:
        return not self._decoder_path or key.startswith(self._decoder_path + ".")

    def _block(self, key: str, scope: str) -> str:
        layer, _ = self._layer_path(key)
        if not self._in_decoder(key):
            return "connector" if layer is None else "vision"
        if scope in ("layer", "model"):
            return scope
        name = key.rpartition(".")[0]
        description = f"{name.rpartition('.')[2]} {type(self.model.get_submodule(name)).__name__}".lower()
        return "attention" if "attn" in description or "attention" in description else "mlp"

    # ---- state around a forward

    @contextmanager
    def routing_context(
        self,
        *,
        attention_mask: torch.Tensor | None = None,
        modality_ids: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
    ) -> Iterator[None]:
        """
        States what routers cannot read from a layer's input, for the forwards (or the `generate`) inside.

        Args:
            attention_mask (`Tensor` [batch, tokens]): 0 at padding. Default: the forward's `attention_mask`.
            modality_ids (`Tensor` int64 [batch, tokens]): For granularity "modality"; tokens generated after
                it are text. Default: 1 where `input_ids` is the config's image or video token, else 0.
            prompt_mask (`Tensor` [batch, tokens]): 1 at the tokens that sequence-level choices see; state it
                when training, where the answer stands behind the prompt. Default: the attention mask. For
                prompt_region "first_user_turn" there is no default, and tokens after the mask's are outside.
        """
        previous = self._state.given
        given = dict(zip(_CONTEXT_FIELDS, (attention_mask, modality_ids, prompt_mask), strict=True))
        self._state.given = {
            **previous,
            **{name: value for name, value in given.items() if value is not None},
        }
        try:
            yield
        finally:
            self._state.given = previous

    def _begin_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._state.begin(args, kwargs, self._active_configs(), getattr(self.model, "config", None))
        for sites in self._sites.values():
            for site in sites:
                site.begin_forward()

    def _end_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._state.in_forward = False
        failed = output is None
        if torch.is_grad_enabled() and not failed:
            return  # backward may recompute checkpointed layers, whose modules reuse the decision
        for sites in self._sites.values():
            for site in sites:
                site.end_forward()
                if failed:
                    site.recorded = None

    def _capture_prompt(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        configs = [config for config in self._active_configs() if config.router_input == "prompt_mean"]
        if not self._state.is_prefill or not configs:
            return
        embedding = self.model.get_input_embeddings()
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = embedding(model_input(args, kwargs))
        self._state.capture_prompt(embeds, configs, embedding, getattr(self.model, "config", None))

    def _active_configs(self) -> list[MoeLoraConfig]:
        return [self.peft_config[name] for name in self.active_adapters]

    # ---- public

    def routers(self, adapter_name: str | None = None) -> list[MoeLoraRouter]:
        """The routers of one adapter (None: of the active ones), in the model's order of definition."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        return [site.router for name in names for site in self._sites[name]]

    def router_aux_loss(self) -> torch.Tensor:
        """
        Mean over sites of the Switch balance loss E * sum_e f_e P_e over unpadded tokens, from the last
        training-mode forward; 1 when balanced, up to E. Not multiplied by `router_aux_loss_coef`.

        It is handed out once: the next call needs another forward.
        """
        losses = [site.aux_loss() for name in self.active_adapters for site in self._sites[name]]
        losses = [loss for loss in losses if loss is not None]
        if not losses:
            raise RuntimeError(
                "There is no balance loss: no forward in training mode, with gradients, came before."
            )
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    @torch.no_grad()
    def copy_experts_from_shared(self, adapter_name: str = "default", noise_std: float = 0.0) -> None:
        """Starts every routed expert as a copy of the shared one, plus gaussian noise of `noise_std` on A."""
        config = self.peft_config[adapter_name]
        if not config.use_shared_expert:
            raise ValueError(
                "copy_experts_from_shared needs a shared expert, but use_shared_expert is False."
            )
        for layer in self.model.modules():
            if isinstance(layer, MoeLoraLayer) and layer.num_experts.get(adapter_name, 0) > 0:
                r = layer.r[adapter_name]
                lora_A = layer.lora_A[adapter_name].unflatten(0, (-1, r))  # (E+1, r, in)
                lora_B = layer.lora_B[adapter_name].unflatten(1, (-1, r))  # (out, E+1, r)
                lora_A[:-1] = lora_A[-1:] + noise_std * torch.randn_like(lora_A[:-1])
                lora_B[:, :-1] = lora_B[:, -1:]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._sites.pop(adapter_name, None)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSED)

    def unload(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        return super().unload()


def _is_plain_target(config: MoeLoraConfig, key: str) -> bool:
    if config.plain_target_modules is None:
        return False
    plain = copy.copy(config)
    plain.target_modules = config.plain_target_modules
    return bool(check_target_module_exists(plain, key))


def _decoder_path(model: nn.Module) -> str:
    """Path of the text decoder inside `model`; "", the model itself, where it has none of its own."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((path for path, module in model.named_modules() if module is decoder), "")
