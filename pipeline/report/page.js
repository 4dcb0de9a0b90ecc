(() => {
  "use strict";
  const form = document.getElementById("find");
  const open = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  addEventListener("hashchange", open);
  open();
  if (!form) return;

  const list = document.getElementById("list");
  const asRun = [...list.children];
  const { text, order, all } = form.elements;
  const said = form.querySelector("output");
  const number = (study, name, absent) => (study.dataset[name] === "" ? absent : Number(study.dataset[name]));
  const orders = {
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, "en", { numeric: true }),
    remarks: (a, b) => number(b, "remarks", 0) - number(a, "remarks", 0),
    dice: (a, b) => number(a, "dice", 2) - number(b, "dice", 2),
    seconds: (a, b) => number(b, "seconds", 0) - number(a, "seconds", 0),
  };

  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const study of asRun) shown += !(study.hidden = !study.dataset.name.includes(wanted));
    said.value = wanted ? `${shown} of ${asRun.length} shown` : "";
  };
  const sort = () => list.append(...(order.value ? [...asRun].sort(orders[order.value]) : asRun));
  const fold = () => {
    const unfold = asRun.some((study) => !study.hidden && !study.open);
    for (const study of asRun) if (!study.hidden) study.open = unfold;
    label();
  };
  const label = () => {
    all.textContent = asRun.some((study) => !study.open) ? "Unfold all" : "Fold all";
  };

  text.addEventListener("input", filter);
  order.addEventListener("change", sort);
  all.addEventListener("click", fold);
  list.addEventListener("toggle", label, true);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  label();
  filter();
  sort();
})();
