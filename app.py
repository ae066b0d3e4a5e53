"""The web app with the flags of the model card's demo; without any, on the model and SAEs that come with the package.

    python app.py \\
        --model Qwen/Qwen3.5-2B \\
        --model-name-sae-trained-from qwen3.5-2b-base \\
        --model-name-analyzing-now qwen3.5-2b \\
        --sae-path Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_50 \\
        --top-k 50 --num-layers 24 --sae-width 32768 --d-model 2048 \\
        --server-port 7860

`qwen-scope app` has more: passwords, other hosts, an index of your own, limits.
"""

import sys

from qwen_scope.cli.card_app import main

if __name__ == "__main__":
    sys.exit(main())
