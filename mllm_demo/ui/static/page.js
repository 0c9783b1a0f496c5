// Keeps the conversation at its newest message. Gradio does so only until pictures, which load late, push it away.
// Says what the pictures beside answers show, which Gradio leaves out of the page; their files are named by it.
() => {
  const describe = (chat) => {
    for (const image of chat.querySelectorAll('.bot-row img[src]:not([alt]), .bot-row img[src][alt=""]')) {
      image.alt = decodeURIComponent(image.src.split("/").pop()).replace(/\.png$/, "");
    }
  };
  // On a narrow page the chat itself scrolls, on a wide one the log in it.
  const end = (...boxes) => boxes.forEach((box) => box.scrollTo({ top: box.scrollHeight }));
  const follow = (chat) => {
    let count = 0;
    new MutationObserver(() => {
      const log = chat.querySelector('[role="log"]');
      const now = chat.querySelectorAll(".message-row, .message-row img").length;
      [0, 250].forEach((delay) => setTimeout(() => describe(chat), delay));
      if (log && now > count) [0, 250, 700].forEach((delay) => setTimeout(() => end(log, chat), delay));
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
