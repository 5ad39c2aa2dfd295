"""Draw docs/run.png: the player, in the middle of the reference run on The Great Gatsby.

    python -m bhfast.train --sigma 0 --out run.safetensors
    python docs/run.py run.safetensors docs/run.png

Needs bhfast[report] and Chromium.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

import bhfast
from bhfast import lattice
from bhfast.report.embed import player_html
from bhfast.report.names import token_names
from bhfast.report.player import player_data
from bhfast.summary import find_vectors

SIZE = 1040, 915  # CSS pixels
VIEW = """<script>
"use strict";
const wait = setInterval(() => {
  if (!player.data) return;
  clearInterval(wait);
  player.trails.checked = true;
  player.changed();
  player.cloud.scaleBy(1.45);
  player.cloud.panX = 110;
  player.cloud.panY = -50;
  player.select(player.data.find("e")[0]);
  player.seekStep(3000);
}, 10);
</script>"""

found = find_vectors(bhfast.open_trace(sys.argv[1]))
data = player_data(found, token_names(found), lattice.life(found.vectors, found.steps))
style = "<style>:root { color-scheme: dark } body { font: 16px system-ui; margin: 0 12px } figure { margin: 0 }</style>"
with TemporaryDirectory() as folder:
    page, shot = Path(folder, "page.html"), Path(folder, "shot.png")
    page.write_text(f"<!doctype html><meta charset='utf-8'>{style}{player_html(data.pack())}{VIEW}", encoding="utf-8")
    options = [
        *("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/profile"),
        *(
            "--blink-settings=preferredColorScheme=0",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            "--virtual-time-budget=5000",
        ),
    ]
    subprocess.run(["chromium", *options, f"--screenshot={shot}", page.as_uri()], check=True, stderr=subprocess.DEVNULL)
    Image.open(shot).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(sys.argv[2], optimize=True)
