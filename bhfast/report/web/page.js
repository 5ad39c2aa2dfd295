"use strict";

const player = new Player(document.getElementById("player"));
const embedded = document.getElementById("player-data");
if (embedded) {
  const packed = Uint8Array.from(atob(embedded.textContent), (character) => character.charCodeAt(0));
  player.load(packed).catch((error) => {
    player.root.hidden = false;
    player.root.replaceChildren(`The player does not run in this browser: ${error.message}`);
  });
}
