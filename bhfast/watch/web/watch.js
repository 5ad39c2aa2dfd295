"use strict";

// Asks for the state of the run once a second, and for what the player shows when there is more of it.

const SECOND = 1000;
const state = document.getElementById("state");
const note = document.getElementById("note");
let shown = "";

function say(text, more) {
  state.textContent = text;
  note.textContent = more;
  document.title = `${text} · ${document.querySelector("h1").textContent}`;
}

async function look() {
  const now = await (await fetch("/state")).json();
  const steps = now.last_step === null ? "" : `, step ${now.last_step.toLocaleString("en")}`;
  let more = now.note;
  if (now.records && now.version !== shown) {
    const answer = await fetch(`/data?have=${encodeURIComponent(shown)}`);
    if (answer.status === 200) {
      await player.load(new Uint8Array(await answer.arrayBuffer()));
      shown = answer.headers.get("X-Version");
    } else if (answer.status === 409) {
      more = await answer.text();
    }
  }
  say(now.state + steps, more);
}

async function follow() {
  try {
    await look();
  } catch (error) {
    say("bhfast watch has ended", error.message);
  }
  setTimeout(follow, SECOND);
}

follow();
