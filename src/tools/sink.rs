//! An output file that is compressed with gzip if its name ends in `.gz`.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bireme_base::output::{OutputError, OutputFile};
use flate2::Compression;
use flate2::write::GzEncoder;

/// See the module.
#[derive(Debug)]
pub struct Sink {
    path: PathBuf,
    writer: Writer,
}

#[derive(Debug)]
enum Writer {
    Plain(OutputFile),
    Gzip(Box<GzEncoder<OutputFile>>),
}

/// Whether the name ends in `.gz`.
pub fn is_gzip(path: &Path) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gz"))
}

impl Sink {
    /// See [`OutputFile::create`].
    ///
    /// # Errors
    /// Returns an error if the path cannot be written, or another process writes it.
    pub fn create(path: &Path, note: &mut dyn FnMut(&str)) -> Result<Self, OutputError> {
        let file = OutputFile::create(path, note)?;
        let writer = if is_gzip(path) {
            Writer::Gzip(Box::new(GzEncoder::new(file, Compression::default())))
        } else {
            Writer::Plain(file)
        };
        Ok(Self { path: path.to_owned(), writer })
    }

    /// Whether this is the standard output.
    pub fn is_stdout(&self) -> bool {
        match &self.writer {
            Writer::Plain(file) => file.is_stdout(),
            Writer::Gzip(encoder) => encoder.get_ref().is_stdout(),
        }
    }

    /// See [`OutputFile::publish`].
    ///
    /// # Errors
    /// Returns an error if a write fails.
    pub fn publish(self) -> Result<(), OutputError> {
        let Self { path, writer } = self;
        let file = match writer {
            Writer::Plain(file) => file,
            Writer::Gzip(encoder) => encoder.finish().map_err(|source| OutputError::Io {
                action: "write",
                path,
                source,
            })?,
        };
        file.publish()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.writer {
            Writer::Plain(file) => file.write(bytes),
            Writer::Gzip(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.writer {
            Writer::Plain(file) => file.flush(),
            // A flush would end a block of the compressed stream.
            Writer::Gzip(_) => Ok(()),
        }
    }
}
