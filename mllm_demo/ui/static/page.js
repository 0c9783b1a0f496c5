// Keeps the conversation at its newest message. Gradio does so only until pictures, which load late, push it away.
() => {
  const end = (log) => log.scrollTo({ top: log.scrollHeight });
  const follow = (chat) => {
    let count = 0;
    new MutationObserver(() => {
      const log = chat.querySelector('[role="log"]');
      const now = chat.querySelectorAll(".message-row").length;
      if (log && now > count) [0, 250, 700].forEach((delay) => setTimeout(() => end(log), delay));
      count = now;
    }).observe(chat, { childList: true, subtree: true });
  };
  const wait = setInterval(() => {
    const chat = document.getElementById("chat");
    if (!chat) return;
    clearInterval(wait);
    follow(chat);
  }, 100);
}
