// One item on the page: its answers in the order of preference, moved by keys, by buttons or by dragging.
// Texts go in by textContent alone: an answer that holds markup is shown, never run.

const HELP = "Keys: type the answers' numbers, best first, with = before a number that ties with the last. " +
  "Or go to an answer with Tab, move it with the arrow keys, and tie it with the one above with T. " +
  "Enter saves, S skips, U takes back the last ranking, Escape starts over.";
const WAIT = 6000; // milliseconds after which a kernel that hasn't answered is called silent

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, label, act) {
  const element = make("button", "", text);
  element.type = "button";
  element.setAttribute("aria-label", label);
  element.addEventListener("click", act);
  return element;
}

function render({ model, el }) {
  let order = [], tied = [], typed = 0, tie = false, touched = false, waiting = null, dragged = null;

  const root = make("section", "minirlhf-ranking");
  root.setAttribute("aria-label", "Rank the answers");
  root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own keys stay out of here
  root.tabIndex = -1;
  const bar = make("progress");
  bar.setAttribute("aria-label", "rankings saved");
  const count = make("span", "count");
  const head = make("div", "head");
  head.append(bar, count);
  const prompt = make("p", "prompt");
  prompt.setAttribute("aria-live", "polite");
  const list = make("ol", "answers");
  const save = button("Save (Enter)", "Save this ranking", () => rank());
  const skip = button("Skip (S)", "Skip this prompt", () => send({ do: "skip" }));
  const undo = button("Undo (U)", "Take back the last ranking", () => send({ do: "undo" }));
  const keys = make("div", "keys");
  keys.append(save, skip, undo);
  const said = make("p", "said");
  said.setAttribute("role", "status");
  said.setAttribute("aria-live", "polite");
  root.append(head, prompt, list, keys, said, make("p", "help", HELP));
  el.append(root);

  const current = () => model.get("item");
  const size = () => (current().responses || []).length;

  function places() { // of each answer, 1 the best; ties share a place
    const result = new Array(size());
    let place = 1;
    order.forEach((answer, at) => {
      if (at > 0 && !tied[at]) place = at + 1;
      result[answer] = place;
    });
    return result;
  }

  function send(message) {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      said.textContent = "The kernel does not answer: this is not saved yet. If it is busy with another cell, wait; " +
        "if it has died, restart it and run the cell again.";
    }, WAIT);
    model.send({ ...message, number: current().number });
  }

  function rank() {
    if (!size()) return;
    if (typed > 0 && typed < size()) say(`${size() - typed} answers have no number yet.`);
    else if (!touched) say("Order the answers first; type their numbers if the order is right as it stands.");
    else send({ do: "rank", ranking: places() });
  }

  function say(text) { said.textContent = text; }

  function move(at, to) {
    if (to < 0 || to >= order.length || at === to) return;
    const [answer] = order.splice(at, 1);
    order.splice(to, 0, answer);
    tied = order.map(() => false); // ties are between neighbours, and the neighbours have changed
    touched = true;
    typed = 0;
    draw(answer);
    say(`Answer ${answer + 1} is now at place ${places()[answer]}.`);
  }

  function toggle(at) {
    if (at === 0) return say("The first answer has none above it.");
    tied[at] = !tied[at];
    touched = true;
    const answer = order[at];
    draw(answer);
    say(tied[at] ? `Answer ${answer + 1} ties with answer ${order[at - 1] + 1}.` : `Answer ${answer + 1} ties no more.`);
  }

  function type(answer) {
    const at = order.indexOf(answer);
    if (at < typed) return say(`Answer ${answer + 1} has its place already.`);
    if (typed === 0) tied = order.map(() => false);
    order.splice(at, 1);
    order.splice(typed, 0, answer);
    tied[typed] = tie && typed > 0;
    typed += 1;
    tie = false;
    touched = true;
    draw();
    root.focus({ preventScroll: true });
    say(typed === size() ? "All are ordered: Enter saves." : `Answer ${answer + 1}: place ${places()[answer]}.`);
  }

  function draw(focus) {
    const answers = current().responses || [];
    bar.max = model.get("total");
    bar.value = model.get("done");
    count.textContent = `${model.get("done")} of ${model.get("total")}`;
    const asked = answers.length ? current().prompt : "All are ranked. Thank you!";
    if (prompt.textContent !== asked) prompt.textContent = asked; // a screen reader reads what changes
    list.replaceChildren();
    const numbers = answers.length ? places() : [];
    order.forEach((answer, at) => {
      const row = make("li", tied[at] ? "answer tied" : "answer");
      row.tabIndex = 0;
      row.draggable = true;
      row.dataset.answer = answer;
      const ties = tied[at] ? ", tied with the one above" : "";
      row.setAttribute("aria-label", `Place ${numbers[answer]}${ties}. Answer ${answer + 1}: ${answers[answer]}`);
      const placed = typed === 0 || at < typed;
      row.append(make("span", "place", placed ? `${numbers[answer]}.` : "?"), make("kbd", "", String(answer + 1)));
      row.append(make("span", "text", answers[answer]));
      const moves = make("span", "moves");
      moves.append(
        button("↑", `Move answer ${answer + 1} up`, () => move(at, at - 1)),
        button("↓", `Move answer ${answer + 1} down`, () => move(at, at + 1)),
        button("=", `Tie answer ${answer + 1} with the one above`, () => toggle(at)),
      );
      row.append(moves);
      row.addEventListener("dragstart", (event) => {
        dragged = at;
        event.dataTransfer.effectAllowed = "move";
        event.dataTransfer.setData("text/plain", String(at));
      });
      row.addEventListener("dragover", (event) => event.preventDefault());
      row.addEventListener("drop", (event) => {
        event.preventDefault();
        event.stopPropagation();
        if (dragged !== null) move(dragged, at);
        dragged = null;
      });
      row.addEventListener("keydown", (event) => {
        if (event.target !== row) return;
        if (event.key === "ArrowUp") move(at, at - 1);
        else if (event.key === "ArrowDown") move(at, at + 1);
        else if (event.key === "t" || event.key === "T") toggle(at);
        else return;
        event.preventDefault();
        event.stopPropagation();
      });
      list.append(row);
    });
    for (const element of [save, skip]) element.disabled = !answers.length;
    if (focus !== undefined) list.querySelector(`[data-answer="${focus}"]`)?.focus({ preventScroll: true });
  }

  function begin() { // a new item, or the same one again
    order = [...Array(size()).keys()];
    tied = order.map(() => false);
    typed = 0;
    tie = touched = false;
    draw();
  }

  root.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const digit = "123456789".indexOf(event.key);
    if (digit >= 0 && digit < size()) type(digit);
    else if (event.key === "=") {
      tie = true;
      say("The next number ties with the last.");
    } else if (event.key === "Enter" && event.target.tagName !== "BUTTON") rank();
    else if (event.key === "s" || event.key === "S") send({ do: "skip" });
    else if (event.key === "u" || event.key === "U") send({ do: "undo" });
    else if (event.key === "Escape") {
      begin();
      say("Starting over.");
    } else return;
    event.preventDefault();
  });

  function answered() {
    clearTimeout(waiting);
    say(model.get("message"));
  }
  let shown;
  function changed() { // an item, and only then
    const number = current().number;
    const again = model.get("message") !== "" && number === shown && model.get("message").startsWith("Not saved");
    shown = number;
    if (!again) begin();
    const inside = root.contains(document.activeElement) || document.activeElement === document.body;
    if (inside && model.get("message")) root.focus({ preventScroll: true });
  }
  const update = () => {
    changed();
    answered();
  };
  model.on("msg:custom", update);
  begin();
  shown = current().number;
  return () => {
    clearTimeout(waiting);
    model.off("msg:custom", update);
  };
}

export default { render };
