//! An HTTP client over plain sockets, which can break the rules of HTTP.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use serde_json::Value;

/// The answer to a request whose body is text.
#[derive(Debug)]
pub struct Answer {
    /// 0 if the server closed without an answer.
    pub status: u16,
    /// In lower case.
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Sends bytes as they are and reads until the server closes.
pub fn exchange(address: &str, bytes: &[u8]) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    // Slowly, for a refusal to come before all is sent.
    for piece in bytes.chunks(1 << 16) {
        stream.write_all(piece)?;
        thread::sleep(Duration::from_millis(2 * (piece.len() >> 16) as u64));
    }
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok(Answer { status, head: head.to_lowercase(), body: body.to_owned() })
}

/// Sends `what`, a method and a path, with a body of text.
pub fn ask(address: &str, what: &str, headers: &str, body: &str) -> Answer {
    let length = body.len();
    let text = format!(
        "{what} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\
         {headers}Content-Length: {length}\r\n\r\n{body}"
    );
    exchange(address, text.as_bytes()).unwrap()
}

/// The answer to a request whose body is bytes.
pub struct BytesAnswer {
    pub status: u16,
    /// In lower case.
    pub head: String,
    pub body: Vec<u8>,
}

/// Like [`ask`], with a body of bytes.
pub fn ask_bytes(address: &str, what: &str, headers: &str, body: &[u8]) -> BytesAnswer {
    let length = body.len();
    let head = format!(
        "{what} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\
         {headers}Content-Length: {length}\r\n\r\n"
    );
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
    let answer = read_all(stream).unwrap();
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    let body = &answer[end + 4..];
    let is_chunked = head.contains("transfer-encoding: chunked");
    let body = if is_chunked { unchunked(body) } else { body.to_vec() };
    BytesAnswer { status: head.split(' ').nth(1).unwrap().parse().unwrap(), head, body }
}

/// All bytes of a reader.
pub fn read_all(mut reader: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).map(|_| bytes)
}

fn unchunked(mut chunks: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = chunks.windows(2).position(|bytes| bytes == b"\r\n").unwrap();
        let n = usize::from_str_radix(std::str::from_utf8(&chunks[..end]).unwrap(), 16).unwrap();
        if n == 0 {
            return body;
        }
        body.extend(&chunks[end + 2..end + 2 + n]);
        chunks = &chunks[end + 4 + n..];
    }
}
