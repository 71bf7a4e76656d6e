/* What the page does in the browser itself: it keeps conversations and settings in localStorage.
 *
 *   hadal.chat.<id>    one conversation each, so that two tabs do not overwrite each other's
 *   hadal.settings.1   the values of the settings panel, in its order
 *   sessionStorage hadal.open   which conversation this tab shows
 *
 * Functions return what Gradio's event listeners expect: one value, or a list with one value per output.
 */
"use strict";

window.hadal = (() => {
  const PREFIX = "hadal.chat.";
  const SETTINGS = "hadal.settings.1";
  const update = (props) => ({ __type__: "update", ...props });

  const fetchJson = (store, key) => {
    try {
      return JSON.parse(store.getItem(key));
    } catch {
      return null;
    }
  };

  function put(key, value) {
    try {
      localStorage.setItem(key, JSON.stringify(value));
      return true;
    } catch {
      toast("This browser's storage is full: delete conversations, after exporting what you want to keep.");
      return false;
    }
  }

  function empty() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const id = Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
    const now = Date.now() / 1000;
    return { id, title: "New conversation", created: now, updated: now, turns: [] };
  }

  function all() {
    const found = [];
    for (let i = 0; i < localStorage.length; i++) {
      const key = localStorage.key(i);
      if (!key.startsWith(PREFIX)) continue;
      const chat = fetchJson(localStorage, key);
      if (chat && chat.id && Array.isArray(chat.turns)) found.push(chat);
    }
    return found.sort((a, b) => b.updated - a.updated);
  }

  const list = (id) => update({ choices: all().map((c) => [c.title, c.id]), value: id });
  const show = (chat) => {
    sessionStorage.setItem("hadal.open", chat.id);
    return [chat, list(chat.id), update({ visible: false })];
  };

  /* Showing another conversation takes two trips to the server. A question sent between them would be drawn
   * and then wiped out, so the box takes none until the conversation stands; `settled` ends that. */
  const SWITCHING = "hadal-switching";
  let patience = 0;
  function switching() {
    document.body.classList.add(SWITCHING);
    lock(true);
    clearTimeout(patience);
    patience = setTimeout(settled, 10000); // a server that went away must not leave the box locked
  }
  function settled() {
    clearTimeout(patience);
    document.body.classList.remove(SWITCHING);
    lock(false);
    return [];
  }
  function lock(on) {
    const box = document.querySelector("#hadal-box textarea");
    if (box) box.readOnly = on;
  }
  function hold(event) {
    if (!document.body.classList.contains(SWITCHING)) return;
    if (event.type === "keydown" && event.key !== "Enter") return;
    if (!event.target.closest("#hadal-box, #hadal-chat .examples")) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  }
  document.addEventListener("keydown", hold, true);
  document.addEventListener("click", hold, true);
  document.addEventListener("click", (e) => e.target.closest("#hadal-new, #hadal-delete") && switching(), true);
  document.addEventListener("input", (e) => e.target.closest("#hadal-list") && switching(), true);

  function boot(values) {
    const kept = fetchJson(localStorage, SETTINGS);
    const settings = Array.isArray(kept) && kept.length === values.length ? kept : values;
    const id = sessionStorage.getItem("hadal.open");
    const chat = (id && fetchJson(localStorage, PREFIX + id)) || all()[0] || empty();
    sessionStorage.setItem("hadal.open", chat.id);
    document.body.classList.add("hadal-ready");
    switching();
    name("#hadal-left", "Conversations");
    name("#hadal-right", "Settings");
    return [chat, update({ open: !narrow() }), ...settings];
  }

  const narrow = () => window.matchMedia("(max-width: 768px)").matches;
  function name(panel, text) {
    const button = document.querySelector(`${panel} .toggle-button`);
    if (button) button.title = button.ariaLabel = text;
  }

  /* On a phone an open panel covers the talk; a tap beside it, or choosing a conversation, closes it. */
  function closePanels(event) {
    if (!narrow()) return;
    const chosen = event.target.closest("#hadal-list label, #hadal-new");
    if (!chosen && event.target.closest(".sidebar")) return;
    for (const button of document.querySelectorAll(".sidebar.open .toggle-button")) button.click();
  }
  document.addEventListener("click", closePanels);

  const keep = (values) => put(SETTINGS, values);

  function save(chat) {
    if (!chat) return list(null);
    if (chat.turns.length) put(PREFIX + chat.id, chat);
    else localStorage.removeItem(PREFIX + chat.id);
    sessionStorage.setItem("hadal.open", chat.id);
    return list(chat.id);
  }

  const fresh = () => show(empty());
  const open = (id) => show(fetchJson(localStorage, PREFIX + id) || empty());

  function remove(chat) {
    if (!chat || !chat.turns.length) return fresh();
    if (!window.confirm(`Delete the conversation “${chat.title}” from this browser?`)) return show(chat);
    localStorage.removeItem(PREFIX + chat.id);
    return show(all()[0] || empty());
  }

  const askTitle = (chat) => update({ visible: true, value: chat ? chat.title : "" });
  function rename(chat, title) {
    const name = title.trim();
    return [name ? { ...chat, title: name } : chat, update({ visible: false })];
  }

  function download(chat) {
    if (!chat) return;
    const messages = chat.turns.flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn.answer, reasoning_content: turn.reasoning },
    ]);
    const text = JSON.stringify({ title: chat.title, messages, hadal: chat }, null, 2);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = (chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation") + ".json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function toast(text) {
    const box = document.createElement("div");
    box.className = "hadal-toast";
    box.setAttribute("role", "alert");
    box.textContent = text;
    document.body.append(box);
    setTimeout(() => box.remove(), 8000);
  }

  /* The chat's copy button takes the thought and the figures along; people want the answer. */
  function copyAnswer(event) {
    const button = event.target.closest("#hadal-chat .message-buttons-left button:first-of-type");
    if (!button || !navigator.clipboard) return;
    const panels = [...document.querySelectorAll("#hadal-chat .message-buttons-left")];
    const chat = fetchJson(localStorage, PREFIX + sessionStorage.getItem("hadal.open"));
    const turn = chat && chat.turns[panels.indexOf(button.closest(".message-buttons-left"))];
    if (turn && turn.answer) setTimeout(() => navigator.clipboard.writeText(turn.answer), 50);
  }
  document.addEventListener("click", copyAnswer);

  /* The API key that was typed into the chat page's settings (their last value), for the other pages. */
  function key() {
    const kept = fetchJson(localStorage, SETTINGS);
    return Array.isArray(kept) && typeof kept.at(-1) === "string" ? kept.at(-1) : "";
  }

  return { key, boot, settled, keep, save, fresh, open, remove, askTitle, rename, download };
})();
