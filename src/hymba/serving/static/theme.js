// Runs before the page is drawn, so that a remembered theme does not flash up in the other.
try {
  const theme = localStorage.getItem("hymba.theme");
  if (theme) document.documentElement.dataset.theme = JSON.parse(theme);
} catch {
  // Storage is closed to this page: the system's theme it is.
}
