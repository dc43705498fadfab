//! Opens files, pipes and stdin; detects formats by the first bytes; decompresses.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek};
use std::os::fd::AsFd;
use std::path::Path;

use bireme_base::message::quoted;
use flate2::bufread::GzDecoder;
use zip::ZipArchive;

use crate::error::Error;

const STDIN: &str = "-";
/// The first bytes, from which the format is detected.
const HEAD: u64 = 1 << 12;

pub(super) enum Content {
    Parquet(File),
    Text(Text),
}

/// A stream of text, possibly compressed.
pub(super) enum Text {
    Plain(Box<dyn Read + Send>),
    Compressed { decoder: Box<dyn Read + Send>, outside: &'static str },
    Zip(Box<ZipArchive<BufReader<File>>>),
}

/// The format of a stream, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum StreamKind {
    Gzip,
    Zstd,
    Zip,
    Parquet,
    Other { what: &'static str, hint: &'static str },
}

/// Formats that are refused, by their first bytes.
const OTHERS: [(&[u8], &str, &str); 23] = [
    (b"PARE", "an encrypted parquet file", DECRYPT),
    (b"BZh", "a bzip2 file", "decompress it first: `bzip2 -d`"),
    (b"\xfd7zXZ\0", "an xz file", "decompress it first: `xz -d`"),
    (b"\x04\x22\x4d\x18", "an lz4 file", "decompress it first: `lz4 -d`"),
    (b"\x1f\x9d", "a compress (.Z) file", "decompress it first: `gzip -d`"),
    (b"\x1f\xa0", "a compress (.Z) file", "decompress it first: `gzip -d`"),
    (b"LZIP", "an lzip file", "decompress it first: `lzip -d`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: `7z x`"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it first: `unrar x`"),
    (b"ARROW1", "a feather (Arrow) file", PANDAS),
    (b"FEA1", "a feather file", PANDAS),
    (b"ORC", "an ORC file", PANDAS),
    (b"Obj\x01", "an Avro file", CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", PANDAS),
    (b"SQLite format 3\0", "an SQLite database", "export the table as CSV: `sqlite3 -csv -header`"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook or Office document", CONVERT),
    (b"%PDF-", "a PDF document", CONVERT),
    (b"\x93NUMPY", "a NumPy array", PANDAS),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "fetch the file: `git lfs pull`",
    ),
    // Before UTF-16, whose mark is a prefix of this one.
    (b"\xff\xfe\0\0", "UTF-32 text", "convert it: `iconv -f UTF-32 -t UTF-8`"),
    (b"\0\0\xfe\xff", "UTF-32 text", "convert it: `iconv -f UTF-32 -t UTF-8`"),
    (b"\xff\xfe", "UTF-16 text", UTF16),
    (b"\xfe\xff", "UTF-16 text", UTF16),
];

const CONVERT: &str = "convert it to CSV or parquet";
const DECRYPT: &str = "write it without encryption";
const PANDAS: &str = "convert it to CSV or parquet, for instance with pandas";
const UTF16: &str = "convert it: `iconv -f UTF-16 -t UTF-8`";

fn kind(head: &[u8]) -> Option<StreamKind> {
    // A frame of zstd, or a skippable frame.
    let zstd = matches!(head, [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    match head {
        [b'P', b'A', b'R', b'1', ..] => Some(StreamKind::Parquet),
        [0x1f, 0x8b, ..] => Some(StreamKind::Gzip),
        [b'P', b'K', 3 | 5, 4 | 6, ..] => Some(StreamKind::Zip),
        _ if zstd => Some(StreamKind::Zstd),
        _ if head.get(257..262) == Some(b"ustar") => {
            Some(StreamKind::Other { what: "a tar archive", hint: "unpack it first: `tar -xf`" })
        }
        _ => {
            let other = OTHERS.into_iter().find(|(start, ..)| head.starts_with(start));
            other.map(|(_, what, hint)| StreamKind::Other { what, hint })
        }
    }
}

/// What a text without a header of events is instead.
pub(super) fn text_kind(path: &Path, head: &[u8]) -> Option<Error> {
    let text = String::from_utf8_lossy(head);
    let text = text.trim_start().to_lowercase();
    let n_zeros = head.iter().filter(|byte| **byte == 0).count();
    let is_control = |byte: &&u8| **byte < b' ' && !matches!(**byte, b'\t' | b'\n' | b'\r');
    let (what, hint) = match text.chars().next()? {
        // In UTF-16, every other byte of Latin text is zero.
        _ if n_zeros * 3 > head.len() && n_zeros * 3 < head.len() * 2 => ("UTF-16 text", UTF16),
        _ if head.iter().filter(is_control).count() * 20 > head.len() => {
            ("no text, but binary data of an unknown kind", CONVERT)
        }
        '{' | '[' => ("JSON", CONVERT),
        '<' if text.starts_with("<!doctype html") || text.starts_with("<html") => {
            ("an HTML page", "the download may have failed")
        }
        '<' => ("XML", CONVERT),
        _ => return None,
    };
    Some(refused(path, what, hint))
}

fn refused(path: &Path, what: impl Into<String>, hint: &'static str) -> Error {
    Error::Format { path: path.into(), what: what.into(), hint }
}

/// Opens events and detects their format. A stream in a format that needs random access is copied
/// to `scratch`.
pub(super) fn open(path: &Path, scratch: &Path) -> Result<Content, Error> {
    let cannot_open = |source| Error::Open { path: path.into(), source };
    let is_stdin = path == Path::new(STDIN);
    let mut file = if is_stdin {
        io::stdin().as_fd().try_clone_to_owned().map(File::from).map_err(cannot_open)?
    } else {
        File::open(path).map_err(cannot_open)?
    };
    let metadata = file.metadata().map_err(cannot_open)?;
    if metadata.is_dir() {
        return Err(refused(path, "a directory", "name the files in it"));
    }
    let unreadable = |e: io::Error| Error::unreadable(path)(e.into());
    let mut head = Vec::new();
    file.by_ref().take(HEAD).read_to_end(&mut head).map_err(unreadable)?;
    let kind = kind(&head);
    let has_its_end = |file: File, head: Vec<u8>| -> Result<File, Error> {
        // If stdin is a regular file, another process may have read a part of it.
        if metadata.is_file() && !is_stdin {
            return Ok(file);
        }
        let mut copy = tempfile::tempfile_in(scratch).map_err(Error::io("write into", scratch))?;
        io::copy(&mut Cursor::new(head).chain(file), &mut copy)
            .map_err(Error::io("write into", scratch))?;
        copy.rewind().map_err(Error::io("read", scratch))?;
        Ok(copy)
    };
    let stream = |file, head| Cursor::new(head).chain(file);
    let text = match kind {
        Some(StreamKind::Parquet) => return Ok(Content::Parquet(has_its_end(file, head)?)),
        Some(StreamKind::Other { what, hint }) => return Err(refused(path, what, hint)),
        Some(StreamKind::Zip) => {
            let mut file = has_its_end(file, head)?;
            file.rewind().map_err(unreadable)?;
            let archive = super::guard::guarded(path, || {
                ZipArchive::new(BufReader::new(file)).map_err(|e| Error::unreadable(path)(e.into()))
            })?;
            check_members(path, &archive)?;
            Text::Zip(Box::new(archive))
        }
        Some(StreamKind::Gzip) => {
            let file = BufReader::with_capacity(1 << 18, stream(file, head));
            let decoder = Box::new(Gzip { member: Some(GzDecoder::new(file)) });
            Text::Compressed { decoder, outside: "a gzip file" }
        }
        Some(StreamKind::Zstd) => {
            let decoder = zstd::Decoder::new(stream(file, head)).map_err(unreadable)?;
            Text::Compressed { decoder: Box::new(decoder), outside: "a zstd file" }
        }
        None => Text::Plain(Box::new(stream(file, head))),
    };
    Ok(Content::Text(text))
}

/// The files in an archive, without those that macOS adds.
fn members(archive: &ZipArchive<BufReader<File>>) -> Vec<(usize, String)> {
    let is_file = |name: &str| {
        !(name.ends_with(['/', '\\'])
            || name.starts_with("__MACOSX/")
            || name.ends_with(".DS_Store"))
    };
    let name = |i: usize| {
        let name = archive.name_for_index(i)?;
        Some((i, name.map_or_else(|_| format!("file {}", i + 1), Cow::into_owned)))
    };
    let names = (0..archive.len()).filter_map(name);
    names.filter(|(_, name)| is_file(name)).collect()
}

fn check_members(path: &Path, archive: &ZipArchive<BufReader<File>>) -> Result<(), Error> {
    let members = members(archive);
    let names: Vec<&str> = members.iter().map(|(_, name)| name.as_str()).collect();
    match names[..] {
        [_] => Ok(()),
        [] => Err(refused(path, "a zip archive without a file", CONVERT)),
        _ if names.contains(&"xl/workbook.xml") => {
            Err(refused(path, "an Excel workbook", "save the sheet as CSV"))
        }
        _ if names.contains(&"[Content_Types].xml") || names.contains(&"META-INF/manifest.xml") => {
            Err(refused(path, "an Office document", "save the table as CSV"))
        }
        _ => {
            let listed: Vec<String> = names.iter().take(4).map(|name| quoted(name)).collect();
            let more = if names.len() > 4 { ", …" } else { "" };
            let what =
                format!("a zip archive with {} files: {}{more}", names.len(), listed.join(", "));
            Err(refused(path, what, "unpack it, and name the files of events"))
        }
    }
}

impl Text {
    /// Runs `read` on the decompressed stream.
    pub fn with<T>(
        self,
        path: &Path,
        read: impl FnOnce(&mut dyn Read) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self {
            Self::Plain(mut stream) => read(&mut stream),
            Self::Compressed { mut decoder, outside } => decoded(path, &mut decoder, outside, read),
            Self::Zip(mut archive) => {
                let member = members(&archive).first().map_or(0, |(i, _)| *i);
                let mut file =
                    archive.by_index(member).map_err(|e| Error::unreadable(path)(e.into()))?;
                decoded(path, &mut file, "a zip archive", read)
            }
        }
    }
}

/// Runs `read` on the decompressed stream, unless it is not text.
fn decoded<T>(
    path: &Path,
    decoder: &mut dyn Read,
    outside: &str,
    read: impl FnOnce(&mut dyn Read) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut head = Vec::new();
    (&mut *decoder)
        .take(HEAD)
        .read_to_end(&mut head)
        .map_err(|e| Error::unreadable(path)(e.into()))?;
    let (what, hint) = match kind(&head) {
        None => return read(&mut Cursor::new(head).chain(decoder)),
        Some(StreamKind::Other { what, hint }) => (what, hint),
        Some(StreamKind::Parquet) => {
            ("a parquet file", "parquet is compressed by itself: decompress it first")
        }
        Some(StreamKind::Gzip) => ("a gzip file", "decompress it first"),
        Some(StreamKind::Zstd) => ("a zstd file", "decompress it first"),
        Some(StreamKind::Zip) => ("a zip archive", "decompress it first"),
    };
    Err(refused(path, format!("{outside} with {what} in it"), hint))
}

/// Concatenated gzip members, which zeros may follow, as on tapes and in object stores. Anything
/// else after a member is an error.
struct Gzip<R> {
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let n = member.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let Some(mut rest) = self.member.take().map(GzDecoder::into_inner) else { break };
            let next = loop {
                let bytes = rest.fill_buf()?;
                let Some(n_zeros) = bytes.iter().position(|byte| *byte != 0) else {
                    let n = bytes.len();
                    if n == 0 {
                        break None;
                    }
                    rest.consume(n);
                    continue;
                };
                let next = bytes[n_zeros];
                rest.consume(n_zeros);
                break Some(next);
            };
            match next {
                None => {}
                Some(0x1f) => self.member = Some(GzDecoder::new(rest)),
                Some(_) => {
                    let problem = "there are bytes after the gzip data that belong to no gzip file";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
                }
            }
        }
        Ok(0)
    }
}

/// The size of an input in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ExpectedBytes {
    /// Of uncompressed text.
    pub plain: u64,
    /// Of compressed text or parquet.
    pub compressed: u64,
}

/// The size of a file of events. That of a pipe is unknown: a few gigabytes are assumed.
pub(crate) fn expected_bytes(path: &Path) -> Result<ExpectedBytes, Error> {
    let stream = ExpectedBytes { plain: 4 << 30, compressed: 0 };
    if path == Path::new(STDIN) {
        return Ok(stream);
    }
    let cannot_open = |source| Error::Open { path: path.into(), source };
    let metadata = fs::metadata(path).map_err(cannot_open)?;
    if !metadata.is_file() {
        return Ok(stream);
    }
    let mut head = Vec::new();
    File::open(path)
        .map_err(cannot_open)?
        .take(HEAD)
        .read_to_end(&mut head)
        .map_err(cannot_open)?;
    let bytes = metadata.len();
    Ok(match kind(&head) {
        None => ExpectedBytes { plain: bytes, compressed: 0 },
        Some(_) => ExpectedBytes { plain: 0, compressed: bytes },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_by_their_first_bytes() {
        let what = |head: &[u8]| match kind(head) {
            Some(StreamKind::Other { what, .. }) => what,
            _ => "",
        };
        assert_eq!(what(b"\xff\xfee\0v\0"), "UTF-16 text");
        assert_eq!(what(b"\xff\xfe\0\0e\0\0\0"), "UTF-32 text");
        assert_eq!(what(b"ARROW1\0\0"), "a feather (Arrow) file");
        let mut tar = vec![b'x'; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert_eq!(what(&tar), "a tar archive");
        assert_eq!(kind(b"event_time,"), None);
        assert_eq!(kind(b""), None);
        assert_eq!(kind(b"PK\x05\x06"), Some(StreamKind::Zip));
        assert_eq!(kind(&[0x5a, 0x2a, 0x4d, 0x18, 0]), Some(StreamKind::Zstd));
    }

    #[test]
    fn texts_without_a_header_are_named() {
        let what = |head: &[u8]| match text_kind(Path::new("x"), head) {
            Some(Error::Format { what, .. }) => what,
            _ => String::new(),
        };
        assert_eq!(what(b" [{\"event_time\": 1}]"), "JSON");
        assert_eq!(what(b"\n<!DOCTYPE html><html>"), "an HTML page");
        assert_eq!(what(b"<?xml version"), "XML");
        assert_eq!(what(b"e\0v\0e\0n\0t\0"), "UTF-16 text");
        assert_eq!(what(b"{\x01\x02\x03"), "no text, but binary data of an unknown kind");
        assert_eq!(what(&[1, 2, 3, 4, 0x7f]), "no text, but binary data of an unknown kind");
        assert_eq!(what(b"a;b;c"), "");
        assert_eq!(what(b""), "");
    }
}
