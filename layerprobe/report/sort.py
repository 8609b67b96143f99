"""The one script of a page: a table is sorted by the column whose heading is pressed. Without it pages are whole, too.

The page's policy names it by its hash, so that a browser runs nothing else.
"""

from __future__ import annotations

import base64
import hashlib

SCRIPT = """
for (const table of document.querySelectorAll("table.stack")) {
  const body = table.tBodies[0], heads = table.tHead.rows[0].cells;
  if (body.rows.length < 3) continue;
  const text = (row, column) => row.cells[column].textContent.trim();
  const number = words => {
    const found = words.match(/^(?:▸ )?([+\\-−]?[\\d,]*\\.?\\d+(?:e[+-]?\\d+)?)(?: ([kMG])\\b)?/);
    const size = { k: 1e3, M: 1e6, G: 1e9 };
    return found ? Number(found[1].replaceAll(",", "").replace("−", "-")) * (size[found[2]] || 1) : NaN;
  };
  for (const [column, head] of [...heads].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = [...body.rows].some(row => !Number.isNaN(number(text(row, column)))) && column > 0;
      const before = head.ariaSort || (numeric ? "ascending" : "descending");
      const way = before === "ascending" ? -1 : 1;
      const order = (a, b) => {
        if (!numeric) return way * text(a, column).localeCompare(text(b, column), "en", { numeric: true });
        const [x, y] = [number(text(a, column)), number(text(b, column))];
        return Number.isNaN(x) - Number.isNaN(y) || (Number.isNaN(x) ? 0 : way * (x - y));
      };
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = way > 0 ? "ascending" : "descending";
      body.append(...[...body.rows].sort(order));
    });
  }
}
"""
POLICY = f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
