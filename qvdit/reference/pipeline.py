"""A diffusers pipeline that samples pixels: a transformer, a flow-matching scheduler and a table of prompts.

There is no VAE and no text encoder, so a whole video model fits in a few megabytes. It is saved, loaded and given
another transformer (``pipe.transformer = …``) like any other ``DiffusionPipeline``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from qvdit.reference import world


class PromptTable(ModelMixin, ConfigMixin):
    """Turns prompts of the drawn world into condition tokens by looking them up in a fixed random codebook."""

    @register_to_config
    def __init__(self, text_dim: int = 64, vocabulary: int = world.VOCABULARY):
        super().__init__()
        self.codebook = torch.nn.Parameter(torch.zeros(vocabulary, text_dim), requires_grad=False)

    @classmethod
    def draw(cls, generator: torch.Generator, text_dim: int = 64) -> PromptTable:
        """A table with a freshly drawn codebook of standard normal rows, rounded to float16 as it is shipped."""
        table = cls(text_dim=text_dim)
        rows = torch.randn(world.VOCABULARY, text_dim, generator=generator, device=generator.device)
        table.codebook.data = rows.half().float()
        return table

    def embed(self, scenes: world.SceneBatch) -> torch.Tensor:
        """Condition tokens of a batch of scenes, [B, 7, text_dim]."""
        return self.codebook[scenes.tokens()]

    def forward(self, prompts: list[str]) -> torch.Tensor:
        """Condition tokens of prompts, [B, 7, text_dim]; the empty prompt is the unconditional one."""
        rows = []
        for prompt in prompts:
            if prompt.strip():
                rows.append(self.embed(world.SceneBatch.from_scenes([world.parse_prompt(prompt)], self.device)))
            else:
                rows.append(self.codebook[:1].expand(1, world.PROMPT_TOKENS, -1))
        return torch.cat(rows)


@dataclass
class PixelVideoOutput(BaseOutput):
    """``frames``: float32 [B, 3, T, H, W] in -1 … 1, a torch tensor."""

    frames: torch.Tensor


class PixelVideoPipeline(DiffusionPipeline):
    """Samples videos of the drawn world from prompts, with classifier-free guidance in one batch."""

    model_cpu_offload_seq = "prompt_table->transformer"

    def __init__(self, transformer: Any, scheduler: FlowMatchEulerDiscreteScheduler, prompt_table: PromptTable):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, prompt_table=prompt_table)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 20,
        guidance_scale: float = 2.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> PixelVideoOutput:
        """Sample one video a prompt.

        latents: the noise to start from, float32 [B, 3, T, H, W]; drawn from ``generator`` when absent.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device, dtype = self.prompt_table.device, self.transformer.dtype
        guided = guidance_scale > 1
        condition = self.prompt_table(prompts)
        if guided:
            condition = torch.cat([self.prompt_table([""] * len(prompts)), condition])
        if latents is None:
            latents = draw_noise(len(prompts), generator)
        latents = latents.to(device, torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            batch = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(
                hidden_states=batch.to(dtype),
                timestep=timestep.expand(batch.shape[0]),
                encoder_hidden_states=condition.to(dtype),
                return_dict=False,
            )[0].float()
            if guided:
                free, told = velocity.chunk(2)
                velocity = free + guidance_scale * (told - free)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return PixelVideoOutput(frames=latents.clamp(-1, 1))


def draw_noise(count: int, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Starting noise for ``count`` videos, float32 [B, 3, T, H, W] on the CPU; a list of generators is one a video."""
    shape = (count, 3, world.FRAMES, world.SIZE, world.SIZE)
    return randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=torch.float32)
