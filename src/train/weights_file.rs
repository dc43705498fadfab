//! Reads weights that another program has saved.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bireme_base::user_error::{REFUSED, UserError};
use tch::{Kind, Tensor};

use crate::checkpoint::{CheckpointError, read_tensors};

/// An error of a weights file.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file has another format.
    #[error("`{path}` is {kind}, not a safetensors file")]
    Kind { path: PathBuf, kind: &'static str, hint: &'static str },
    #[error("`{path}` is cut off: it has {found} bytes, its header requires {expected}")]
    CutOff {
        path: PathBuf,
        found: u64,
        /// Smallest size of the complete file.
        expected: u64,
    },
    #[error("`{path}`: tensor `{tensor}` {problem}")]
    Tensor { path: PathBuf, tensor: String, problem: String },
    #[error("cannot read `{path}`")]
    Open { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Unreadable(#[from] CheckpointError),
}

impl UserError for WeightsError {
    fn exit_code(&self) -> i32 {
        REFUSED
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Kind { hint, .. } => Some((*hint).to_owned()),
            _ => None,
        }
    }
}

const FROM_PYTORCH: &str = "convert it: `python -c 'import safetensors.torch as s, torch; \
                            s.save_file(torch.load(\"model.pth\", map_location=\"cpu\"), \
                            \"model.safetensors\")'`";
const FROM_NUMPY: &str = "convert it: `python -c 'import safetensors.numpy as s, numpy; \
                          s.save_file(dict(numpy.load(\"model.npz\")), \"model.safetensors\")'`";
const FROM_ELSEWHERE: &str = "weights are read as `safetensors.torch.save_file(model.state_dict(), \
                              FILE)` writes them, of a session model of Transformers4Rec";

/// Kinds of files, with a hint, by their first bytes.
const KINDS: [(&[u8], &str, &str); 9] = [
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes weights", FROM_ELSEWHERE),
    (b"GGUF", "a GGUF file", FROM_ELSEWHERE),
    (b"\x93NUMPY", "a NumPy array", FROM_NUMPY),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first"),
    (b"PAR1", "a parquet file", FROM_ELSEWHERE),
    (b"{", "JSON", "give the safetensors file itself, not its index"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself by `git lfs pull`"),
    // The first opcode of pickle protocols 2 to 5.
    (b"\x80", "a pickle, as older versions of PyTorch save", FROM_PYTORCH),
];

/// Reads the named tensors of a safetensors file. All must be floating-point and finite.
pub(super) fn read(path: &Path) -> Result<Vec<(String, Tensor)>, WeightsError> {
    let open = |source| WeightsError::Open { path: path.to_owned(), source };
    let kind = |kind, hint| WeightsError::Kind { path: path.to_owned(), kind, hint };
    let metadata = fs::metadata(path).map_err(open)?;
    if metadata.is_dir() {
        return Err(kind("a folder", "give the safetensors file in it"));
    }
    if !metadata.is_file() {
        return Err(kind(
            "a pipe or a device",
            "weights are mapped into memory: give a regular file",
        ));
    }
    if metadata.len() == 0 {
        return Err(kind("empty", FROM_ELSEWHERE));
    }
    let tensors = read_tensors(path).map_err(|error| match diagnose(path, metadata.len()) {
        Ok(Some(Diagnosis::OtherFormat(format, hint))) => kind(format, hint),
        Ok(Some(Diagnosis::CutOff(expected))) => {
            WeightsError::CutOff { path: path.to_owned(), found: metadata.len(), expected }
        }
        Ok(None) => error.into(),
        Err(source) => open(source),
    })?;
    for (name, tensor) in &tensors {
        let refused = |problem: String| {
            Err(WeightsError::Tensor { path: path.to_owned(), tensor: name.clone(), problem })
        };
        if !matches!(tensor.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
            return refused(format!("is of type {:?}, not floating-point", tensor.kind()));
        }
        if tensor.to_kind(Kind::Float).isfinite().all().int64_value(&[]) == 0 {
            return refused("holds NaN, or numbers that are infinite as f32".to_owned());
        }
    }
    Ok(tensors)
}

enum Diagnosis {
    /// The name of the format, and a hint.
    OtherFormat(&'static str, &'static str),
    /// A truncated safetensors file, and its complete size in bytes.
    CutOff(u64),
}

/// Finds out from the first bytes of a file why it is not a safetensors file.
fn diagnose(path: &Path, n_bytes: u64) -> io::Result<Option<Diagnosis>> {
    let mut first = Vec::new();
    File::open(path)?.take(1 << 16).read_to_end(&mut first)?;
    if first.starts_with(b"PK") {
        // The name of the first file of a zip archive follows a header of 30 bytes.
        let name_len =
            first.get(26..28).map_or(0, |n| usize::from(u16::from_le_bytes([n[0], n[1]])));
        let name = first.get(30..30 + name_len).unwrap_or_default();
        let (kind, hint) = if name.ends_with(b".npy") {
            ("an archive of NumPy arrays", FROM_NUMPY)
        } else {
            ("a zip archive, as PyTorch saves", FROM_PYTORCH)
        };
        return Ok(Some(Diagnosis::OtherFormat(kind, hint)));
    }
    // A safetensors file begins with the length of its JSON header.
    let header = first.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
    if let Some(header) = header.filter(|_| first.get(8) == Some(&b'{')) {
        let expected = 8_u64.saturating_add(header);
        let header = usize::try_from(expected).ok().and_then(|end| first.get(8..end));
        let end = header
            .and_then(|header| serde_json::from_slice::<serde_json::Value>(header).ok())
            .and_then(|header| {
                let ends = header
                    .as_object()?
                    .values()
                    .filter_map(|tensor| tensor["data_offsets"][1].as_u64());
                Some(expected.saturating_add(ends.max()?))
            });
        let expected = end.unwrap_or(expected);
        return Ok((expected > n_bytes).then_some(Diagnosis::CutOff(expected)));
    }
    let kind = KINDS.into_iter().find(|(mark, ..)| first.starts_with(mark));
    Ok(kind.map(|(_, kind, hint)| Diagnosis::OtherFormat(kind, hint)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: &[u8]) -> (String, Option<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        fs::write(&path, bytes).unwrap();
        let error = read(&path).unwrap_err();
        (error.to_string().replace(path.to_str().unwrap(), "FILE"), error.hint())
    }

    #[test]
    fn an_error_names_the_format_of_a_file_and_how_to_convert_it() {
        let zip = |name: &str| {
            let mut bytes = b"PK\x03\x04".to_vec();
            bytes.resize(26, 0);
            bytes.extend((name.len() as u16).to_le_bytes());
            bytes.extend([0, 0]);
            bytes.extend(name.as_bytes());
            bytes
        };
        for (bytes, kind, hint) in [
            (zip("archive/data.pkl"), "a zip archive, as PyTorch saves", FROM_PYTORCH),
            (zip("arr_0.npy"), "an archive of NumPy arrays", FROM_NUMPY),
            (
                b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(),
                "a pickle, as older",
                FROM_PYTORCH,
            ),
            (b"\x89HDF\r\n\x1a\n\0\0".to_vec(), "an HDF5 file", FROM_ELSEWHERE),
            (b"GGUF\x03\0\0\0".to_vec(), "a GGUF file", FROM_ELSEWHERE),
            (b"\x93NUMPY\x01\0".to_vec(), "a NumPy array", FROM_NUMPY),
            (
                b"{\"metadata\": {}}".to_vec(),
                "JSON",
                "give the safetensors file itself, not its index",
            ),
            (Vec::new(), "empty", FROM_ELSEWHERE),
        ] {
            let (text, found) = message(&bytes);
            assert!(text.starts_with(&format!("`FILE` is {kind}")), "{text}");
            assert_eq!(found.as_deref(), Some(hint), "{text}");
        }
        let (text, _) = message(b"no tensors");
        assert!(text.starts_with("cannot read `FILE`"), "{text}");
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).unwrap_err().to_string().contains("is a folder"));
    }

    #[test]
    fn truncated_safetensors_files_are_recognised() {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let whole = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
        for n_bytes in [9, 30, whole.len() - 1] {
            let (text, _) = message(&whole[..n_bytes]);
            assert!(
                text.starts_with(&format!("`FILE` is cut off: it has {n_bytes} bytes")),
                "{text}"
            );
        }
    }

    #[test]
    fn tensors_must_be_floating_point_and_finite() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let read_one = |tensor: Tensor| {
            Tensor::write_safetensors(&[("a", tensor)], &path).unwrap();
            read(&path).map(|tensors| tensors.len()).map_err(|error| error.to_string())
        };
        for kind in [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16] {
            assert_eq!(read_one(Tensor::from_slice(&[1.0f32]).to_kind(kind)), Ok(1), "{kind:?}");
        }
        let integers = read_one(Tensor::from_slice(&[1i64])).unwrap_err();
        assert!(
            integers.ends_with("tensor `a` is of type Int64, not floating-point"),
            "{integers}"
        );
        for value in [f64::NAN, 1e300] {
            let error = read_one(Tensor::from_slice(&[value])).unwrap_err();
            assert!(
                error.ends_with("tensor `a` holds NaN, or numbers that are infinite as f32"),
                "{error}"
            );
        }
    }
}
