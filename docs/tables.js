/* A search field above every table of more than 40 rows. */
document.querySelectorAll(".md-typeset table").forEach((table) => {
  const rows = [...table.querySelectorAll("tbody tr")];
  if (rows.length <= 40) return;
  const field = document.createElement("input");
  field.className = "table-filter";
  field.type = "search";
  field.placeholder = `Filter ${rows.length} rows`;
  field.setAttribute("aria-label", field.placeholder);
  field.addEventListener("input", () => {
    const word = field.value.toLowerCase();
    rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(word); });
  });
  (table.closest(".md-typeset__scrollwrap") || table).before(field);
});
