"""What the benchmark measures: models, parts of the work, and the ways in which each library does them."""

from dataclasses import replace

from ldm.config import TextConfig, UNetConfig, VAEConfig
from ldm.presets import SD15, SD21, SDXL_BASE, SDXL_REFINER, TINY

CUT_DOWN = replace(
    SD15,
    name="cut-down",
    unet=UNetConfig(channels=(64, 128), depth=(1, 1), heads=(2, 2), context_dim=64),
    vae=VAEConfig(channels=(32, 32, 64, 64), res_blocks=1),
    text=(TextConfig(width=64, layers=2, heads=2, mlp=128),),
)
REFINER_WIDTHS = replace(  # the widths of SDXL's refiner, in a UNet that runs anywhere
    CUT_DOWN,
    name="refiner-widths",
    unet=replace(SDXL_REFINER.unet, res_blocks=1, depth=(0, 1, 1, 0), mid_depth=1, context_dim=64, vector_dim=None),
)
CASES = {  # architecture and pixels, in the order of the tables
    "bundled-128": (TINY, 128),
    "cut-down-64": (CUT_DOWN, 64),
    "sd15-256": (SD15, 256),
    "sd15-512": (SD15, 512),
    "sd15-1024": (SD15, 1024),
    "sd15-2048": (SD15, 2048),
    "sd21-768": (SD21, 768),
    "sdxl-1024": (SDXL_BASE, 1024),
    "refiner-widths-256": (REFINER_WIDTHS, 256),
}
DEFAULTS = {  # for each device: cases, dtypes, and the steps of a picture
    "cpu": (["sd15-256", "sd15-512"], ["float32", "bfloat16"], 4),
    "cuda": (["sd15-512", "sd21-768", "sdxl-1024"], ["float16", "bfloat16"], 20),
}
PLANS = {  # the runs that are made if no case, part or variant is chosen
    "cpu": [
        "--parts command --cases bundled-128",
        "--parts step decode txt2img --cases bundled-128 --variants ldm ldm-not-packed ldm-library",
        "--parts step --cases refiner-widths-256 --variants ldm ldm-not-packed",
        "--parts memory --cases sd15-512 sd15-1024 sd15-2048 sd21-768 sdxl-1024",
        "--parts import text decode encode txt2img --cases sd15-256",
        "--parts step --cases sd15-256 --variants ldm ldm-library ldm-not-packed ldm-library-fast",
        "--parts step --cases sd15-256 --against diffusers-kept-memory",
        "--parts step --cases sd15-256 --variants ldm-sequential --against ldm",
        "--parts step decode txt2img --cases sd15-512",
        "--parts decode --cases sd15-1024 --variants ldm-slabs ldm-tiles --against ldm --dtypes bfloat16",
        "--parts load_file load_folder ready_file --cases sd15-256 --variants ldm ldm-library",
    ],
    "cuda": [
        "--parts command --cases bundled-128",
        "--parts memory --cases sd15-512 sd15-1024 sd15-2048 sd21-768 sdxl-1024",
        "--parts import text step decode encode txt2img",
        "--parts step txt2img --variants ldm-graph ldm-compiled",
        "--parts step txt2img --against diffusers-compiled",
        "--parts step txt2img --variants ldm-sequential ldm-offload-model ldm-offload-blocks",
        "--parts decode --cases sd15-1024 --variants ldm-slabs ldm-tiles --against ldm",
        "--parts load_file load_folder ready_file --cases sd15-512",
    ],
}
COMPUTING = ["text", "step", "decode", "encode", "txt2img"]
STARTING = ["ready_file", "ready_folder"]
TIMED = ["load_file", "load_folder", *STARTING, *COMPUTING]
PROCESSES = ["command", "import"]  # each run is a new process
PARTS = ["memory", *PROCESSES, *TIMED]
SIDES = {  # the differences from `DEFAULT`; the name begins with the library's name
    "ldm": {},
    "ldm-library": {"command": False, "fast": False},
    "ldm-library-fast": {"command": False},
    "ldm-not-packed": {"placement": {"packed": False}},
    "ldm-sdpa": {"placement": {"attention": "sdpa"}},
    "ldm-sliced": {"placement": {"attention": "sliced"}},
    "ldm-math": {"placement": {"attention": "math"}},
    "ldm-sequential": {"placement": {"guidance": "sequential"}},
    "ldm-slabs": {"placement": {"vae_memory": "slabs"}},
    "ldm-tiles": {"placement": {"vae_memory": "tiles"}},
    "ldm-graph": {"placement": {"cuda_graph": True}},
    "ldm-compiled": {"placement": {"compile": True}},
    "ldm-offload-model": {"placement": {"offload": "model"}},
    "ldm-offload-blocks": {"placement": {"offload": "blocks"}},
    "diffusers": {},
    "diffusers-kept-memory": {
        "env": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # settings of glibc
    },
    "diffusers-compiled": {"compiled": True},
}
DEFAULT = {
    "env": {},  # environment variables of the process
    "command": True,  # keep freed memory, as the `ldm` command does
    "fast": True,  # ldm.Placement.fast, or ldm.Placement
    "placement": {},  # its fields beside device and dtype
    "compiled": False,  # compile the UNet of diffusers
}
