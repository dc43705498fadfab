//! Named tensors as the KServe v2 protocol carries them: row-major, little endian, texts with their lengths in front.

use std::fmt;

/// The element type of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DataType {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Bf16,
    Fp32,
    Fp64,
    Bytes,
}

impl DataType {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Bool,
        Self::Uint8,
        Self::Uint16,
        Self::Uint32,
        Self::Uint64,
        Self::Int8,
        Self::Int16,
        Self::Int32,
        Self::Int64,
        Self::Fp16,
        Self::Bf16,
        Self::Fp32,
        Self::Fp64,
        Self::Bytes,
    ];

    /// Its name in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Bf16 => "BF16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bytes => "BYTES",
        }
    }

    /// The type of a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|datatype| datatype.name() == name)
    }

    /// All names, for messages.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// Bytes of an element; none for [`DataType::Bytes`], whose elements differ.
    pub fn size(self) -> Option<usize> {
        match self {
            Self::Bool | Self::Uint8 | Self::Int8 => Some(1),
            Self::Uint16 | Self::Int16 | Self::Fp16 | Self::Bf16 => Some(2),
            Self::Uint32 | Self::Int32 | Self::Fp32 => Some(4),
            Self::Uint64 | Self::Int64 | Self::Fp64 => Some(8),
            Self::Bytes => None,
        }
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor that lies elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Its name.
    pub name: &'a str,
    /// Of its elements.
    pub datatype: DataType,
    /// Sizes, the outermost first.
    pub shape: &'a [i64],
    /// Its elements.
    pub data: &'a [u8],
}

/// A tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Of its elements.
    pub datatype: DataType,
    /// Sizes, the outermost first.
    pub shape: Vec<i64>,
    /// Its elements.
    pub data: Vec<u8>,
}

impl Tensor {
    /// Of int64.
    pub fn ints(name: &str, shape: &[i64], values: impl IntoIterator<Item = i64>) -> Self {
        let data = values.into_iter().flat_map(i64::to_le_bytes).collect();
        Self { name: name.to_owned(), datatype: DataType::Int64, shape: shape.to_vec(), data }
    }

    /// Of float32.
    pub fn floats(name: &str, shape: &[i64], values: impl IntoIterator<Item = f32>) -> Self {
        let data = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Self { name: name.to_owned(), datatype: DataType::Fp32, shape: shape.to_vec(), data }
    }

    /// Of texts.
    pub fn texts<'t>(name: &str, shape: &[i64], texts: impl IntoIterator<Item = &'t str>) -> Self {
        let mut data = Vec::new();
        for text in texts {
            data.extend((text.len() as u32).to_le_bytes());
            data.extend(text.as_bytes());
        }
        Self { name: name.to_owned(), datatype: DataType::Bytes, shape: shape.to_vec(), data }
    }

    /// The same, borrowed.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { name: &self.name, datatype: self.datatype, shape: &self.shape, data: &self.data }
    }
}

impl<'a> TensorView<'a> {
    /// How many elements the shape says there are.
    ///
    /// # Errors
    /// A negative size, or more elements than can be counted.
    pub fn n_elements(&self) -> Result<usize, String> {
        let Self { name, shape, .. } = self;
        if let Some(number) = shape.iter().position(|&size| size < 0) {
            return Err(format!("input `{name}` has the shape {shape:?}: dimension {number} is negative"));
        }
        let product = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size as usize));
        product.ok_or_else(|| format!("input `{name}` has the shape {shape:?}: too many elements to count"))
    }

    /// Checks that there are as many elements as the shape says.
    ///
    /// # Errors
    /// Too few or too many bytes, or texts whose lengths do not add up.
    pub fn check(&self) -> Result<(), String> {
        let n = self.n_elements()?;
        let Some(size) = self.datatype.size() else { return self.split_texts().map(drop) };
        if Some(self.data.len()) == n.checked_mul(size) {
            return Ok(());
        }
        let Self { name, datatype, shape, data } = self;
        let holds = match data.len() % size {
            0 => format!("{} elements", data.len() / size),
            _ => format!("{} bytes", data.len()),
        };
        Err(format!("input `{name}` of shape {shape:?} must hold {n} elements of {datatype}, not {holds}"))
    }

    /// Elements of a type of `N` bytes, which was checked to be the tensor's.
    fn elements<const N: usize>(&self) -> impl Iterator<Item = [u8; N]> + use<'a, N> {
        self.data.chunks_exact(N).map(|bytes| bytes.try_into().expect("chunks of N bytes"))
    }

    fn expect(&self, datatype: DataType) -> Result<(), String> {
        if self.datatype != datatype {
            return Err(format!("input `{}` must be of type {datatype}, not {}", self.name, self.datatype));
        }
        self.check()
    }

    /// Elements of an INT64 tensor.
    ///
    /// # Errors
    /// Another type, or see [`TensorView::check`].
    pub fn i64s(&self) -> Result<Vec<i64>, String> {
        self.expect(DataType::Int64)?;
        Ok(self.elements().map(i64::from_le_bytes).collect())
    }

    /// Elements of an INT32 tensor.
    ///
    /// # Errors
    /// Another type, or see [`TensorView::check`].
    pub fn i32s(&self) -> Result<Vec<i32>, String> {
        self.expect(DataType::Int32)?;
        Ok(self.elements().map(i32::from_le_bytes).collect())
    }

    /// Elements of an FP64 tensor.
    ///
    /// # Errors
    /// Another type, or see [`TensorView::check`].
    pub fn f64s(&self) -> Result<Vec<f64>, String> {
        self.expect(DataType::Fp64)?;
        Ok(self.elements().map(f64::from_le_bytes).collect())
    }

    /// Elements of an FP32 tensor.
    ///
    /// # Errors
    /// Another type, or see [`TensorView::check`].
    pub fn f32s(&self) -> Result<Vec<f32>, String> {
        self.expect(DataType::Fp32)?;
        Ok(self.elements().map(f32::from_le_bytes).collect())
    }

    /// Elements of a BOOL tensor.
    ///
    /// # Errors
    /// Another type, or see [`TensorView::check`].
    pub fn bools(&self) -> Result<Vec<bool>, String> {
        self.expect(DataType::Bool)?;
        Ok(self.data.iter().map(|&byte| byte != 0).collect())
    }

    /// Elements of a BYTES tensor.
    ///
    /// # Errors
    /// Another type, lengths that do not add up, or bytes that are not UTF-8.
    pub fn texts(&self) -> Result<Vec<&'a str>, String> {
        if self.datatype != DataType::Bytes {
            return self.expect(DataType::Bytes).map(|()| Vec::new());
        }
        let text = |(number, bytes)| {
            std::str::from_utf8(bytes)
                .map_err(|_| format!("input `{}`, element {number}: not UTF-8", self.name))
        };
        self.split_texts()?.into_iter().enumerate().map(text).collect()
    }

    fn split_texts(&self) -> Result<Vec<&'a [u8]>, String> {
        let n = self.n_elements()?;
        // Every element takes at least the bytes of its length, so that no shape alone takes memory.
        let mut texts = Vec::with_capacity(n.min(self.data.len() / 4));
        let mut rest = self.data;
        let take = |rest: &mut &'a [u8], n: usize| {
            rest.split_at_checked(n).map(|(taken, after)| {
                *rest = after;
                taken
            })
        };
        for number in 0..n {
            let text = take(&mut rest, 4).and_then(|length| {
                let length = u32::from_le_bytes(length.try_into().expect("4 bytes"));
                take(&mut rest, length as usize)
            });
            texts.push(text.ok_or_else(|| {
                format!("input `{}`, element {number}: its length goes past the end of the data", self.name)
            })?);
        }
        if !rest.is_empty() {
            return Err(format!("input `{}` has {} bytes behind its {n} elements", self.name, rest.len()));
        }
        Ok(texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back() {
        let tensor = Tensor::texts("t", &[3, 1], ["", "é", "abc"]);
        assert_eq!(tensor.view().texts().unwrap(), ["", "é", "abc"]);
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let good = Tensor::texts("t", &[2], ["ab", "c"]);
        let faults: [(&[i64], Vec<u8>, &str); 6] = [
            (&[2], good.data[..10].to_vec(), "element 1: its length goes past the end"),
            (&[3], good.data.clone(), "element 2: its length goes past the end"),
            (&[1], good.data.clone(), "5 bytes behind its 1 elements"),
            (&[1], vec![0xff, 0xff, 0xff, 0xff, 0], "element 0: its length goes past the end"),
            (&[-1], good.data.clone(), "has the shape [-1]: dimension 0 is negative"),
            (&[i64::MAX, 4], good.data.clone(), "too many elements"),
        ];
        for (shape, data, message) in faults {
            let tensor = Tensor { shape: shape.to_vec(), data, ..good.clone() };
            let error = tensor.view().texts().unwrap_err();
            assert!(error.contains(message), "{error}");
        }
        let short = Tensor { data: vec![0; 15], ..Tensor::ints("n", &[2], [1, 2]) };
        assert!(short.view().i64s().unwrap_err().contains("must hold 2 elements of INT64, not 15 bytes"));
        assert!(short.view().f64s().unwrap_err().contains("must be of type FP64, not INT64"));
        let latin = Tensor { data: vec![1, 0, 0, 0, 0xe9], shape: vec![1], ..good };
        assert!(latin.view().texts().unwrap_err().contains("not UTF-8"));
    }
}
