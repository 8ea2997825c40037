// A click on a column's heading, or Enter, sorts the table by it: numbers by value, other cells by their text.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const text = row => row.cells[column].textContent.trim();
    const value = row => parseFloat(text(row).replace(/,/g, "").replace("\u2212", "-"));
    const sort = () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const compare = (a, b) =>
        [value(a), value(b)].some(isNaN) ? text(a).localeCompare(text(b)) : value(a) - value(b);
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
    };
    head.dataset.sortable = "";
    head.tabIndex = 0;
    head.title = "Sort by this column";
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
