//! Requests and answers as JSON, with or without tensors in binary behind it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bireme_etl::serving::Parameter;
use bireme_etl::tensor::{DataType, Tensor};
use serde::de::{self, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::fault::Fault;
use crate::model::Model;
use crate::request::Request;

/// The header with the length of the JSON in front of binary tensors.
pub const HEADER_LENGTH: &str = "inference-header-content-length";

/// The parameter with a request's own limit of time, in microseconds.
pub const TIMEOUT: &str = "timeout";

/// A request as it stood in a body.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    /// The client's name for it.
    pub id: Option<String>,
    /// Its own limit of time.
    pub timeout: Option<Duration>,
    /// Outputs that are wanted in binary, or not; all others as `all_binary` says.
    binary: BTreeMap<String, bool>,
    all_binary: bool,
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(default, borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(default)]
    parameters: BTreeMap<String, Scalar>,
    #[serde(borrow)]
    inputs: Vec<Input<'a>>,
    #[serde(default)]
    outputs: Vec<Output>,
}

#[derive(Deserialize)]
struct Input<'a> {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    #[serde(default)]
    parameters: BTreeMap<String, Scalar>,
    #[serde(default, borrow)]
    data: Option<Cells<'a>>,
}

#[derive(Deserialize)]
struct Output {
    name: String,
    #[serde(default)]
    parameters: BTreeMap<String, Scalar>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Scalar {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

impl From<Scalar> for Parameter {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Bool(value) => Self::Bool(value),
            Scalar::Int(value) => Self::Int(value),
            Scalar::Float(value) => Self::Float(value),
            Scalar::Text(value) => Self::Text(value),
        }
    }
}

fn flag(parameters: &BTreeMap<String, Scalar>, name: &str) -> Result<Option<bool>, Fault> {
    match parameters.get(name) {
        None => Ok(None),
        Some(Scalar::Bool(value)) => Ok(Some(*value)),
        Some(other) => {
            Err(Fault::invalid(format!("parameter `{name}` must be true or false, not {other:?}")))
        }
    }
}

/// A tensor's elements, however deep they were nested.
#[derive(Debug, Default)]
struct Cells<'a>(Vec<Cell<'a>>);

#[derive(Debug)]
enum Cell<'a> {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Text(Cow<'a, str>),
}

impl<'de: 'a, 'a> Deserialize<'de> for Cells<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut cells = Vec::new();
        deserializer.deserialize_any(Flatten(&mut cells))?;
        Ok(Self(cells))
    }
}

/// Puts elements, and those of lists in lists, into one list.
struct Flatten<'c, 'de>(&'c mut Vec<Cell<'de>>);

impl<'de> de::DeserializeSeed<'de> for Flatten<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Flatten<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("numbers, truth values, texts or lists of them")
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.0.push(Cell::Bool(value));
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.0.push(Cell::Int(value));
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.0.push(i64::try_from(value).map_or(Cell::Uint(value), Cell::Int));
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.0.push(Cell::Float(value));
        Ok(())
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<(), E> {
        self.0.push(Cell::Text(Cow::Borrowed(value)));
        Ok(())
    }

    fn visit_str<E>(self, value: &str) -> Result<(), E> {
        self.0.push(Cell::Text(Cow::Owned(value.to_owned())));
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Flatten(self.0))?.is_some() {}
        Ok(())
    }
}

impl Cells<'_> {
    /// The elements as the protocol's bytes.
    fn into_data(self, name: &str, datatype: DataType) -> Result<Vec<u8>, Fault> {
        let mut data = Vec::with_capacity(self.0.len() * datatype.size().unwrap_or(8));
        for (number, cell) in self.0.into_iter().enumerate() {
            push(&mut data, datatype, &cell).ok_or_else(|| {
                Fault::invalid(format!("input `{name}`, element {number}: {cell:?} is no {datatype}"))
            })?;
        }
        Ok(data)
    }
}

/// Adds an element's bytes; none if it is not of the type.
fn push(data: &mut Vec<u8>, datatype: DataType, cell: &Cell<'_>) -> Option<()> {
    macro_rules! int {
        ($type:ty) => {
            match cell {
                Cell::Int(value) => data.extend(<$type>::try_from(*value).ok()?.to_le_bytes()),
                Cell::Uint(value) => data.extend(<$type>::try_from(*value).ok()?.to_le_bytes()),
                _ => return None,
            }
        };
    }
    let float = || match *cell {
        Cell::Float(value) => Some(value),
        Cell::Int(value) => Some(value as f64),
        Cell::Uint(value) => Some(value as f64),
        _ => None,
    };
    match datatype {
        DataType::Bool => match cell {
            Cell::Bool(value) => data.push((*value).into()),
            Cell::Int(value @ (0 | 1)) => data.push(*value as u8),
            _ => return None,
        },
        DataType::Uint8 => int!(u8),
        DataType::Uint16 => int!(u16),
        DataType::Uint32 => int!(u32),
        DataType::Uint64 => int!(u64),
        DataType::Int8 => int!(i8),
        DataType::Int16 => int!(i16),
        DataType::Int32 => int!(i32),
        DataType::Int64 => int!(i64),
        DataType::Fp32 => data.extend((float()? as f32).to_le_bytes()),
        DataType::Fp64 => data.extend(float()?.to_le_bytes()),
        // JSON has no numbers of 16 bits: such tensors come in binary.
        DataType::Fp16 | DataType::Bf16 => return None,
        DataType::Bytes => match cell {
            Cell::Text(text) => {
                data.extend(u32::try_from(text.len()).ok()?.to_le_bytes());
                data.extend(text.as_bytes());
            }
            _ => return None,
        },
    }
    Some(())
}

/// Reads a request: JSON of `header_length` bytes (none: all of it), then tensors in binary.
///
/// # Errors
/// Says what is wrong where.
pub fn read(body: &[u8], header_length: Option<&str>) -> Result<Asked, Fault> {
    let length = match header_length {
        None => body.len(),
        Some(text) => text.parse().ok().filter(|&length| length <= body.len()).ok_or_else(|| {
            Fault::invalid(format!("`{HEADER_LENGTH}` is `{text}`, and the body has {} bytes", body.len()))
        })?,
    };
    let (json, mut binary) = body.split_at(length);
    let parsed: Body<'_> = serde_json::from_slice(json)
        .map_err(|error| Fault::invalid(format!("the request is not what it should be: {error}")))?;
    let mut inputs = Vec::with_capacity(parsed.inputs.len());
    for Input { name, datatype, shape, parameters, data } in parsed.inputs {
        let datatype = DataType::parse(&datatype)
            .ok_or_else(|| Fault::invalid(format!("input `{name}` is of an unknown type `{datatype}`")))?;
        let data = match (parameters.get("binary_data_size"), data) {
            (Some(Scalar::Int(size)), None) => {
                let size = usize::try_from(*size).ok();
                let (own, rest) = size.and_then(|size| binary.split_at_checked(size)).ok_or_else(|| {
                    Fault::invalid(format!(
                        "input `{name}` has fewer than the bytes that `binary_data_size` says"
                    ))
                })?;
                binary = rest;
                own.to_vec()
            }
            (None, Some(cells)) => cells.into_data(&name, datatype)?,
            _ => {
                return Err(Fault::invalid(format!(
                    "input `{name}` must have either `data` or `binary_data_size`"
                )));
            }
        };
        inputs.push(Tensor { name, datatype, shape, data });
    }
    if !binary.is_empty() {
        return Err(Fault::invalid(format!("{} bytes follow the last input", binary.len())));
    }
    let mut parameters = parsed.parameters;
    let all_binary = flag(&parameters, "binary_data_output")?.unwrap_or(false);
    parameters.remove("binary_data_output");
    let timeout = match parameters.remove(TIMEOUT) {
        None => None,
        Some(Scalar::Int(microseconds)) if microseconds > 0 => {
            Some(Duration::from_micros(microseconds.unsigned_abs()))
        }
        Some(other) => {
            return Err(Fault::invalid(format!("`{TIMEOUT}` must be microseconds, not {other:?}")));
        }
    };
    let mut wanted_binary = BTreeMap::new();
    let mut outputs = Vec::new();
    for Output { name, parameters } in parsed.outputs {
        if parameters.contains_key("classification") {
            return Err(Fault::invalid(format!("output `{name}`: this server does not classify")));
        }
        if let Some(is_binary) = flag(&parameters, "binary_data")? {
            wanted_binary.insert(name.clone(), is_binary);
        }
        outputs.push(name);
    }
    let parameters = parameters.into_iter().map(|(name, value)| (name, value.into())).collect();
    Ok(Asked {
        request: Request { inputs, outputs, parameters, max_answer: None },
        id: parsed.id.map(Cow::into_owned),
        timeout,
        binary: wanted_binary,
        all_binary,
    })
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    model_name: &'a str,
    model_version: String,
    outputs: Vec<AnswerOutput<'a>>,
}

#[derive(Serialize)]
struct AnswerOutput<'a> {
    name: &'a str,
    datatype: &'a str,
    shape: &'a [i64],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Elements<'a>>,
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

/// A tensor's elements, flat.
struct Elements<'a>(&'a Tensor);

impl Serialize for Elements<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Tensor { datatype, data, .. } = self.0;
        macro_rules! numbers {
            ($type:ty) => {{
                let mut list = serializer.serialize_seq(None)?;
                for bytes in data.chunks_exact(size_of::<$type>()) {
                    list.serialize_element(&<$type>::from_le_bytes(
                        bytes.try_into().expect("chunks of that size"),
                    ))?;
                }
                list.end()
            }};
        }
        match datatype {
            DataType::Uint8 => numbers!(u8),
            DataType::Uint16 => numbers!(u16),
            DataType::Uint32 => numbers!(u32),
            DataType::Uint64 => numbers!(u64),
            DataType::Int8 => numbers!(i8),
            DataType::Int16 => numbers!(i16),
            DataType::Int32 => numbers!(i32),
            DataType::Int64 => numbers!(i64),
            DataType::Fp32 => numbers!(f32),
            DataType::Fp64 => numbers!(f64),
            DataType::Bool => serializer.collect_seq(data.iter().map(|&byte| byte != 0)),
            DataType::Bytes => {
                let texts = self.0.view().texts().map_err(serde::ser::Error::custom)?;
                serializer.collect_seq(texts)
            }
            DataType::Fp16 | DataType::Bf16 => {
                Err(serde::ser::Error::custom(format!("{datatype} is only given in binary")))
            }
        }
    }
}

/// A body, and the length of the JSON at its front if something follows.
#[derive(Debug)]
pub struct Written {
    /// The body.
    pub body: Vec<u8>,
    /// The length of the JSON.
    pub header_length: Option<usize>,
}

impl Asked {
    /// Writes the answer.
    ///
    /// # Errors
    /// An output that JSON cannot hold.
    pub fn answer<'a>(&'a self, model: &'a Model, outputs: &'a [Tensor]) -> Result<Written, Fault> {
        let is_binary = |tensor: &&Tensor| *self.binary.get(&tensor.name).unwrap_or(&self.all_binary);
        let output = |tensor: &'a Tensor| AnswerOutput {
            name: tensor.name.as_str(),
            datatype: tensor.datatype.name(),
            shape: &tensor.shape,
            parameters: is_binary(&tensor).then_some(BinarySize { binary_data_size: tensor.data.len() }),
            data: (!is_binary(&tensor)).then_some(Elements(tensor)),
        };
        let answer = Answer {
            id: self.id.as_deref(),
            model_name: &model.config.name,
            model_version: model.version.to_string(),
            outputs: outputs.iter().map(output).collect(),
        };
        let mut body = serde_json::to_vec(&answer).map_err(Fault::invalid)?;
        let length = body.len();
        let mut binary = outputs.iter().filter(is_binary).peekable();
        let header_length = binary.peek().map(|_| length);
        binary.for_each(|tensor| body.extend(&tensor.data));
        Ok(Written { body, header_length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_in_lists_and_binary_tensors_are_read() {
        let json = br#"{"id":"7","parameters":{"exclude_seen":true,"timeout":1500,"binary_data_output":true},
            "inputs":[{"name":"a","datatype":"INT64","shape":[2,1],"data":[[1],[-2]]},
                      {"name":"b","datatype":"FP32","shape":[2],"parameters":{"binary_data_size":8}},
                      {"name":"c","datatype":"BYTES","shape":[2],"data":["x","\u00e9\n"]}],
            "outputs":[{"name":"o","parameters":{"binary_data":false}}]}"#;
        let mut body = json.to_vec();
        body.extend([1.5f32, -0.5].into_iter().flat_map(f32::to_le_bytes));
        let asked = read(&body, Some(&json.len().to_string())).unwrap();
        let [a, b, c] = &asked.request.inputs[..] else { panic!("{asked:?}") };
        assert_eq!(*a, Tensor::ints("a", &[2, 1], [1, -2]));
        assert_eq!(*b, Tensor::floats("b", &[2], [1.5, -0.5]));
        assert_eq!(*c, Tensor::texts("c", &[2], ["x", "é\n"]));
        assert_eq!(asked.request.parameters, [("exclude_seen".to_owned(), Parameter::Bool(true))]);
        assert_eq!(asked.timeout, Some(Duration::from_micros(1500)));
        assert_eq!((asked.id.as_deref(), asked.all_binary, asked.binary["o"]), (Some("7"), true, false));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let input = |rest: &str| format!(r#"{{"inputs":[{{"name":"a","shape":[1],{rest}}}]}}"#);
        for (body, message) in [
            (String::new(), "not what it should be"),
            ("[]".to_owned(), "not what it should be"),
            (input(r#""datatype":"INT9","data":[1]"#), "unknown type `INT9`"),
            (input(r#""datatype":"INT8","data":[300]"#), "element 0: Int(300) is no INT8"),
            (input(r#""datatype":"INT64","data":["x"]"#), "is no INT64"),
            (input(r#""datatype":"INT64","data":[null]"#), "expected numbers"),
            (input(r#""datatype":"INT64""#), "either `data` or"),
            (input(r#""datatype":"INT64","parameters":{"binary_data_size":8}"#), "fewer than the bytes"),
            (input(r#""datatype":"INT64","parameters":{"binary_data_size":-8}"#), "fewer than the bytes"),
            ("[".repeat(100_000), "not what it should be"),
            (
                format!(
                    r#"{{"inputs":[{{"name":"a","datatype":"INT8","shape":[1],"data":{}"#,
                    "[".repeat(100_000)
                ),
                "recursion",
            ),
        ] {
            let fault = read(body.as_bytes(), None).unwrap_err();
            assert!(fault.message.contains(message), "{fault}");
        }
        assert!(read(b"{}", Some("3")).unwrap_err().message.contains("has 2 bytes"));
        assert!(read(br#"{"inputs":[]}1234"#, Some("13")).unwrap_err().message.contains("4 bytes follow"));
    }
}
