// Filters the gallery. Without this script all pairs are shown and the controls stay hidden.
(() => {
  const controls = document.querySelector(".controls");
  if (!controls) return;
  const cards = [...document.querySelectorAll(".card")];
  const buttons = [...controls.querySelectorAll("button[data-gallery]")];
  const selects = [...controls.querySelectorAll("select")];
  const search = controls.querySelector("input");
  const shown = document.querySelector("#shown");
  const about = [...document.querySelectorAll("[data-about]")];
  let gallery = buttons[0].dataset.gallery;

  const update = () => {
    const words = search.value.trim().toLowerCase();
    let visible = 0;
    for (const card of cards) {
      const fits =
        (gallery === "all" || card.dataset.gallery === gallery) &&
        selects.every((select) => !select.value || card.dataset[select.name] === select.value) &&
        (!words || card.dataset.words.includes(words));
      card.hidden = !fits;
      visible += fits;
    }
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.gallery === gallery));
    for (const text of about) text.hidden = text.dataset.about !== gallery;
    shown.textContent = visible ? `${visible} of ${cards.length} pairs shown` : "No pair of this gallery fits the filter.";
  };

  for (const button of buttons) {
    button.addEventListener("click", () => {
      gallery = button.dataset.gallery;
      update();
    });
  }
  for (const select of selects) select.addEventListener("change", update);
  search.addEventListener("input", update);
  controls.hidden = false;
  update();
})();
