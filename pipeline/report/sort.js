// A click on a column's heading, or Enter, sorts the table by it: numbers by value, other cells by their text.
const scales = { K: 1e3, M: 1e6, B: 1e9, G: 1e9, T: 1e12, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 };
const digits = "⁰¹²³⁴⁵⁶⁷⁸⁹";

function valueOf(text) {  // the value of 1,024, −0.5 ± 0.1, 28.3 M, 1.52 GiB, 3 min 05 s or 1.3×10¹⁴; NaN for a text
  const plain = text.replace(/\u00a0/g, " ").replace(/,/g, "").replace(/\u2212/g, "-");
  const time = plain.match(/^(?:(\d+) h ?)?(?:(\d+) min ?)?(?:([\d.]+) s)?$/);
  if (time && time[0]) return 3600 * (time[1] || 0) + 60 * (time[2] || 0) + Number(time[3] || 0);
  const power = plain.match(/^(-?[\d.]+)×10([⁰¹²³⁴⁵⁶⁷⁸⁹]+)/);
  if (power) return power[1] * 10 ** [...power[2]].map(digit => digits.indexOf(digit)).join("");
  const scaled = plain.match(/^(-?[\d.]+) (K|M|B|G|T|KiB|MiB|GiB)\b/);
  return scaled ? scaled[1] * scales[scaled[2]] : parseFloat(plain);
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const sort = () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const cells = [...body.rows].map(row => {
        const text = row.cells[column].textContent.trim();
        return { row, text, value: valueOf(text) };
      });
      const numbers = cells.filter(cell => !isNaN(cell.value)).sort((a, b) => sign * (a.value - b.value));
      const texts = cells.filter(cell => isNaN(cell.value)).sort((a, b) => sign * a.text.localeCompare(b.text));
      body.append(...[...numbers, ...texts].map(cell => cell.row));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    };
    head.dataset.sortable = "";
    head.tabIndex = 0;
    head.title = "Sort by this column";
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
