// What the theme leaves unnamed for those who hear a page.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("summary").forEach((summary) => {
    if (!summary.textContent.trim()) summary.setAttribute("aria-label", "pages below this one");
  });
  document.querySelectorAll(".search-button-field").forEach((button) => {
    button.setAttribute("aria-label", button.textContent.replace(/\s+/g, " ").trim());
  });
  document.querySelector(".sidebar-primary-item:has(.navbar-brand)")?.setAttribute("role", "navigation");
  document.querySelector(".sidebar-primary-item:has(.navbar-brand)")?.setAttribute("aria-label", "first page");
});
